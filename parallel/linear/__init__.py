"""Linear recurrences and short convolutions over ranks: state exchange (LASP-2, LASP-1, tree) and halo exchange."""

from longctx.parallel.linear.noncausal import noncausal_linear_attention

__all__ = ["noncausal_linear_attention"]
