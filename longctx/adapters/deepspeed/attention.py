"""DeepSpeed-Ulysses `DistributedAttention`, a drop-in replacement that supports fewer key/value heads than ranks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from longctx.parallel.attention.ulysses import HeadPartition, gather_heads, scatter_heads
from longctx.parallel.mesh import Axis


class DistributedAttention(nn.Module):
    """Ulysses sequence parallelism around a local attention: each rank computes some heads of the whole sequence.

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
        """`local_attention(q, k, v, *args, **kwargs)` receives the whole sequence and this rank's heads. `scatter_idx`:
        the dim of heads; `gather_idx`: the dim of the sequence.

        Raises ValueError for an `sp_stream`, and if heads are not the third dim.
        """
        super().__init__()
        if sp_stream is not None:
            raise ValueError(
                "DistributedAttention: sp_stream: q, k and v share one all-to-all: nothing to overlap; pass None"
            )
        if scatter_idx != 2 or gather_idx not in (0, 1):
            raise ValueError(
                f"DistributedAttention: scatter_idx {scatter_idx} and gather_idx {gather_idx}: expected heads in dim 2 "
                "and the sequence in dim 0 or 1"
            )
        self.local_attn, self.axis = local_attention, Axis.from_group(sequence_process_group)
        self.sequence_dim, self.num_kv_heads = gather_idx, num_kv_heads

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
        """Run the local attention: query `[s/p, b, h, d]` (batch_dim_idx 1) or `[b, s/p, h, d]` (0), key and value with
        their own heads, to the same shape; heads and width in one dim if `local_attention` returns them so.

        Raises ValueError if heads are not divisible by the ranks, dims do not fit, or `rotary_pos_emb` is given.
        """
        if rotary_pos_emb is not None:
            raise ValueError("DistributedAttention: rotary_pos_emb: apply rotary embeddings to query and key before")
        if batch_dim_idx == self.sequence_dim or batch_dim_idx not in (0, 1):
            raise ValueError(
                f"DistributedAttention: batch_dim_idx is {batch_dim_idx}: expected {1 - self.sequence_dim}, since the "
                f"sequence is dim {self.sequence_dim}"
            )
        if self.num_kv_heads is not None and key.shape[2] != self.num_kv_heads:
            raise ValueError(
                f"DistributedAttention: key has {key.shape[2]} heads: expected num_kv_heads = {self.num_kv_heads}"
            )
        if self.axis.group is None:
            return self.local_attn(query, key, value, *args, **kwargs)
        heads = HeadPartition(query.shape[2], key.shape[2], self.axis.size)
        q, k, v = map(self._swap_sequence_dim, (query, key, value))
        scattered = scatter_heads(q, k, v, heads, self.axis.group)
        q, k, v = map(self._swap_sequence_dim, scattered)
        out = self.local_attn(q, k, v, *args, **kwargs)
        by_head = out if out.dim() == 4 else out.unflatten(2, (q.shape[2], -1))
        rows = self._swap_sequence_dim(gather_heads(self._swap_sequence_dim(by_head), heads, self.axis.group))
        return rows if out.dim() == 4 else rows.flatten(2)

    def _swap_sequence_dim(self, x: Tensor) -> Tensor:
        """Move the sequence to dim 1, or back."""
        return x if self.sequence_dim == 1 else x.transpose(0, 1)
