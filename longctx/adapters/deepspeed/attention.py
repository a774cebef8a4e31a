"""DeepSpeed's `DistributedAttention` (Ulysses) with the same constructor and call, for code that has it already."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from longctx.parallel.attention.ulysses import HeadPartition, gather_heads, scatter_heads
from longctx.parallel.mesh import Axis


class DistributedAttention(nn.Module):
    """A local attention over the ranks of a group: each computes some heads of the whole sequence.

    One all-to-all for q, k and v together and one for the output; any number of key/value heads, also fewer than ranks.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor],
        sequence_process_group: ProcessGroup,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
    ) -> None:
        """`local_attention(q, k, v, *args, **kwargs)` of the whole sequence and this rank's heads; `scatter_idx` is the
        dim of heads, `gather_idx` that of the sequence.

        Raises ValueError for a stream of its own (`sp_stream`), and where heads are not the third dim.
        """
        super().__init__()
        if sp_stream is not None:
            raise ValueError(
                "DistributedAttention: sp_stream: q, k and v travel together, and there is nothing to overlap"
            )
        if scatter_idx != 2 or gather_idx not in (0, 1):
            raise ValueError(
                f"DistributedAttention: scatter_idx {scatter_idx} and gather_idx {gather_idx}: expected heads in dim 2 "
                "and the sequence in dim 0 or 1"
            )
        self.local_attn, self.axis, self.sequence_dim = local_attention, Axis.of(sequence_process_group), gather_idx
        self.num_kv_heads = num_kv_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """query `[s/p, b, h, d]` (batch_dim_idx 1) or `[b, s/p, h, d]` (0), key and value with their heads: the same,
        with heads and width as `local_attention` returns them (apart, or together in one dim).

        Raises ValueError where heads do not divide, dims do not fit, and for `rotary_pos_emb`: turn q and k before.
        """
        if rotary_pos_emb is not None:
            raise ValueError("DistributedAttention: rotary_pos_emb: turn queries and keys to their positions before")
        if batch_dim_idx == self.sequence_dim or batch_dim_idx not in (0, 1):
            raise ValueError(
                f"DistributedAttention: batch_dim_idx {batch_dim_idx}, and the sequence is dim {self.sequence_dim}"
            )
        if self.num_kv_heads is not None and key.shape[2] != self.num_kv_heads:
            raise ValueError(f"DistributedAttention: {key.shape[2]} key heads, num_kv_heads is {self.num_kv_heads}")
        if self.axis.group is None:
            return self.local_attn(query, key, value, *args, **kwargs)
        heads = HeadPartition(query.shape[2], key.shape[2], self.axis.size)
        q, k, v = map(self._rows_second, (query, key, value))
        mine = scatter_heads(q, k, v, heads, self.axis.group)
        q, k, v = (self._rows_second(x) for x in mine)
        out = self.local_attn(q, k, v, *args, **kwargs)
        apart = out if out.dim() == 4 else out.unflatten(2, (q.shape[2], -1))
        rows = self._rows_second(gather_heads(self._rows_second(apart), heads, self.axis.group))
        return rows if out.dim() == 4 else rows.flatten(2)

    def _rows_second(self, x: Tensor) -> Tensor:
        """The sequence in dim 1, or back from there."""
        return x if self.sequence_dim == 1 else x.transpose(0, 1)
