"""State scan over ranks (LASP-2): the public path of `longctx.parallel.linear.state_scan`."""

from longctx.parallel.linear.state_scan import begin_state_scan, state_scan

__all__ = ["begin_state_scan", "state_scan"]
