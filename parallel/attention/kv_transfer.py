"""Transfers of key and value rows, or of their gradients, between two KV owners, packed into one message."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.parallel.collectives import Pending, exchange

KeysValues = tuple[Tensor, Tensor]
"""`[B, rows, H_kv, K]` and `[B, rows, H_kv, V]`."""


def take_rows(both: KeysValues, parts: Sequence[slice]) -> KeysValues:
    """Return some rows of keys and values, slice after slice; views where it is one slice."""
    k, v = (
        x[:, parts[0]] if len(parts) == 1 else torch.cat([x[:, :0], *(x[:, part] for part in parts)], dim=1)
        for x in both
    )
    return k, v


def add_rows_(sums: KeysValues, parts: Sequence[slice], both: KeysValues) -> None:
    """Add to some rows of keys and values, in place: the inverse of `take_rows`."""
    for total, added in zip(sums, both, strict=True):
        sizes = [part.stop - part.start for part in parts]
        for part, rows in zip(parts, added.split(sizes, dim=1), strict=True):
            total[:, part] += rows


@dataclass(frozen=True)
class KVTransfer:
    """Rows of keys and values under way, received in one flat buffer."""

    pending: Pending[None]
    buffer: Tensor
    shapes: tuple[torch.Size, torch.Size]

    def wait(self) -> KeysValues:
        """Wait until the rows have arrived, and return them."""
        self.pending.wait()
        k, v = self.buffer.split([shape.numel() for shape in self.shapes])
        return k.view(self.shapes[0]), v.view(self.shapes[1])


def start_transfer(
    both: KeysValues,
    *,
    target: int,
    sent: Sequence[slice],
    source: int,
    received: int,
    group: ProcessGroup,
    tag: int,
) -> KVTransfer:
    """Send the rows `sent` of keys and values to rank `target` of the group, and receive `received` rows from `source`.

    Where there are no rows, there is no message.
    """
    k_shape, v_shape = (torch.Size((x.shape[0], received, *x.shape[2:])) for x in both)
    buffer = both[0].new_empty(k_shape.numel() + v_shape.numel())
    sends = {target: torch.cat([x.reshape(-1) for x in take_rows(both, sent)])} if sent else {}
    receives = {source: buffer} if received else {}
    return KVTransfer(exchange(sends, receives, group, tag), buffer, (k_shape, v_shape))
