"""Intra-chunk decays: the decay factors of a chunk of C tokens, and their gradients.

The log-decay g_t <= 0 is applied to the state before token t writes to it; `sum(a, b)` is the sum of g over a < t <= b.
A chunk uses four factors, for G heads at once:

    pairs(x, y)[i, j] = sum_k x_ik y_jk exp(sum(j, i)_k)     intra-chunk scores, 0 unless j <= i in one document
    reads[i]  = exp(sum(-1, i))      from the chunk's start state to token i, 0 after a document start
    writes[j] = exp(sum(j, C-1))     from token j to the chunk's end state, 0 before the last document start
    keeps     = exp(sum(-1, C-1))    from the start state to the end state, 0 if a document starts in the chunk

Every exponent is a sum of log-decays (for scalar decays a difference of cumulative sums, in float64) and at most 0:
nothing overflows, cancels or is divided, however strong the decay.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from longctx.kernels.linear.chunking import Chunk, ChunkLoop, HeadGroup, Scratch
from longctx.kernels.linear.recurrence import document_ids

MIN_LOG_DECAY = -800.0
"""A log-decay whose exponential is 0 in every dtype, and no smaller: cumulative sums round by their own size."""


class ChunkMasks:
    """Causal and document masks of a chunk, 0 or 1: between tokens `[C, C]`, between a token and the state `[C, 1]`."""

    def __init__(self, chunk: Chunk, dtype: torch.dtype, device: torch.device) -> None:
        ids = document_ids(chunk.size, chunk.starts, device)
        self.starts = chunk.starts
        self.same_document = (ids[:, None] == ids[None, :]).to(dtype)
        self.before_first_start = (ids == 0).to(dtype)[:, None]
        self.after_last_start = (ids == len(chunk.starts)).to(dtype)[:, None]
        self.causal = torch.ones_like(self.same_document).tril()
        self.hidden = self.same_document * self.causal == 0
        """`[C, C]` bool, true where row i may not see column j."""

    @cached_property
    def strictly_causal(self) -> Tensor:
        """`[C, C]`, 1 where j < i."""
        return self.causal.tril(-1)


class Decay(ABC):
    """Decays of one chunk: reads and writes `[G, C, 1]` or `[G, C, K]`, keeps `[G, 1, 1]` or `[G, K, 1]` in float64."""

    def __init__(self, masks: ChunkMasks) -> None:
        self.masks = masks

    @cached_property
    def reads(self) -> Tensor:
        """See the module docstring."""
        reads = self._reads()
        return reads.mul_(self.masks.before_first_start) if self.masks.starts else reads

    @cached_property
    def writes(self) -> Tensor:
        """See the module docstring."""
        writes = self._writes()
        return writes.mul_(self.masks.after_last_start) if self.masks.starts else writes

    @cached_property
    def keeps(self) -> Tensor:
        """See the module docstring."""
        keeps = self._keeps()
        return keeps.zero_() if self.masks.starts else keeps

    @abstractmethod
    def _reads(self) -> Tensor: ...

    @abstractmethod
    def _writes(self) -> Tensor: ...

    @abstractmethod
    def _keeps(self) -> Tensor: ...

    @abstractmethod
    def pairs(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """Compute `pairs(x, y)` of the module docstring in `out` `[G, C, C]`, for x and y `[G, C, K]`."""

    @abstractmethod
    def pairs_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        """Add the gradients of x and y to dx and dy (None: not computed), for the gradient `d` of `pairs(x, y)`.

        Overwrites `d`.
        """

    @abstractmethod
    def pairs_and_decay_grad(
        self, d: Tensor, pairs: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, dg: Tensor
    ) -> None:
        """As `pairs_grad`, and add the gradient of g to dg `[G, C, 1]` or `[G, C, K]`; `pairs` is `pairs(x, y)`."""


class ScalarDecay(Decay):
    """Scalar decay per head: pairs are a matrix product times a decay mask."""

    def __init__(self, g: Tensor, masks: ChunkMasks, scratch: Scratch) -> None:
        """`g`: log-decays `[G, C, 1]`."""
        super().__init__(masks)
        self._dtype, self._scratch = g.dtype, scratch
        # Differences of float64 cumulative sums stay exact after a strong decay earlier in the chunk.
        self._sums = g.double().cumsum(dim=1)

    def _reads(self) -> Tensor:
        return self._sums.exp().to(self._dtype)

    def _writes(self) -> Tensor:
        return (self._sums[:, -1:] - self._sums).exp_().to(self._dtype)

    def _keeps(self) -> Tensor:
        return self._sums[:, -1:].exp()

    @cached_property
    def mask(self) -> Tensor:
        """exp(sum(j, i)) for j <= i in one document, else 0: `[G, C, C]`."""
        groups, size, _ = self._sums.shape
        wide = self._scratch("distance", groups, size, size, dtype=torch.float64)
        distance = torch.sub(self._sums, self._sums.transpose(1, 2), out=wide).to(self._dtype, copy=True)
        return distance.masked_fill_(self.masks.hidden, float("-inf")).exp_()

    def pairs(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        return torch.bmm(x, y.transpose(1, 2), out=out).mul_(self.mask)

    def pairs_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        d.mul_(self.mask)
        if dx is not None:
            dx.baddbmm_(d, y)
        if dy is not None:
            dy.baddbmm_(d.transpose(1, 2), x)

    def pairs_and_decay_grad(
        self, d: Tensor, pairs: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, dg: Tensor
    ) -> None:
        # g_t acts on all pairs with j < t <= i.
        weights = torch.mul(d, pairs, out=self._scratch("weights", *d.shape))
        before = torch.matmul(weights, self.masks.strictly_causal.T)
        dg += before.mul_(self.masks.causal).sum(dim=1)[..., None]
        self.pairs_grad(d, x, y, dx, dy)


class VectorDecay(Decay):
    """Vector decay, one per channel of K: pairs by recursive halving.

    For token j in the left half of a block and i in its right half, `sum(j, i)` is the sum from j to the middle plus
    the sum from the middle to i. The scores between the halves are therefore one matrix product, of x times one
    exponential and y times the other, both at most 1. The halves are blocks themselves, down to single tokens: log2 C
    levels, which together multiply no more than the causal half of the C x C scores. The sums of a level come from
    those of the level below, by additions only.
    """

    def __init__(self, g: Tensor, masks: ChunkMasks, scratch: Scratch) -> None:
        """`g`: log-decays `[G, C, K]`, C a power of two. One object at a time may use a `scratch`."""
        super().__init__(masks)
        self._g, self._scratch = g, scratch

    def _reads(self) -> Tensor:
        if "_levels" in self.__dict__:
            return self._scratch("prefix", *self._g.shape).exp_()
        return self._sum_tokens(self.masks.causal).exp_()

    def _writes(self) -> Tensor:
        if "_levels" in self.__dict__:
            return self._scratch("suffix", *self._g.shape).exp_()
        # The sum over the tokens after each one.
        return self._sum_tokens(self.masks.strictly_causal.T).exp_()

    def _sum_tokens(self, ones: Tensor) -> Tensor:
        """Compute `ones @ g`: sums over tokens as a matrix product, which is faster than a cumulative sum."""
        return torch.bmm(ones.expand(self._g.shape[0], -1, -1), self._g)

    def _keeps(self) -> Tensor:
        return self._g.sum(dim=1, dtype=torch.float64).exp_()[..., None]

    @cached_property
    def _levels(self) -> list[tuple[int, Tensor, Tensor]]:
        """Per level: tokens per half, exp(sum(middle, i)) of right halves, exp(sum(j, middle)) of left halves."""
        groups, size, dim = self._g.shape
        prefix = self._scratch("prefix", groups, size, dim).copy_(self._g)
        suffix = self._scratch("suffix", groups, size, dim).zero_()
        levels = []
        half = 1
        while half < size:
            shape = (groups, size // (2 * half), half, dim)
            before, after = (x.view(groups, -1, 2, half, dim) for x in (prefix, suffix))
            right = torch.exp(before[:, :, 1], out=self._scratch(f"right{half}", *shape))
            left = torch.exp(after[:, :, 0], out=self._scratch(f"left{half}", *shape))
            levels.append((half, right, left))
            after[:, :, 0] += before[:, :, 1, -1:]
            before[:, :, 1] += before[:, :, 0, -1:]
            half *= 2
        return levels

    @staticmethod
    def _blocks(x: Tensor, half: int) -> Tensor:
        """View the scores of right halves with left halves, `[G, blocks, half, half]`, in `x` `[G, C, C]`."""
        groups, size, _ = x.shape
        count = size // (2 * half)
        square = x.view(groups, count, 2 * half, count, 2 * half).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        return square[:, :, half:, :half]

    def _right_rows(self, x: Tensor, half: int, right: Tensor) -> Tensor:
        """Return x of the right halves, decayed from the middle: `[G x blocks, half, K]`."""
        part = x.reshape(x.shape[0], -1, 2, half, x.shape[2])[:, :, 1]
        return torch.mul(part, right, out=self._scratch("ends", *right.shape)).view(-1, half, x.shape[2])

    def _left_rows(self, y: Tensor, half: int, left: Tensor) -> Tensor:
        """Return y of the left halves, decayed to the middle: `[G x blocks, half, K]`."""
        part = y.reshape(y.shape[0], -1, 2, half, y.shape[2])[:, :, 0]
        return torch.mul(part, left, out=self._scratch("begins", *left.shape)).view(-1, half, y.shape[2])

    def _block(self, d: Tensor, half: int) -> Tensor:
        """Copy the scores of right halves with left halves: `[G x blocks, half, half]`."""
        source = self._blocks(d, half)
        return self._scratch("block", *source.shape).copy_(source).view(-1, half, half)

    def pairs(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        out.zero_()
        product = torch.mul(x, y, out=self._scratch("product", *x.shape))
        torch.sum(product, dim=2, out=out.diagonal(dim1=1, dim2=2))
        for half, right, left in self._levels:
            ends, begins = self._right_rows(x, half, right), self._left_rows(y, half, left)
            block = self._scratch("block", ends.shape[0], half, half)
            torch.bmm(ends, begins.transpose(1, 2), out=block)
            target = self._blocks(out, half)
            target.copy_(block.view(target.shape))
        if self.masks.starts:
            out.mul_(self.masks.same_document)
        return out

    def pairs_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        self._diagonal_grad(d, x, y, dx, dy)
        for half, right, left in self._levels:
            block = self._block(d, half)
            if dx is not None:
                self._add_right_grad(block, self._left_rows(y, half, left), right, dx)
            if dy is not None:
                self._add_left_grad(block, self._right_rows(x, half, right), left, dy)

    def _diagonal_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        if self.masks.starts:
            d.mul_(self.masks.same_document)
        diagonal = d.diagonal(dim1=1, dim2=2)[..., None]
        if dx is not None:
            dx.addcmul_(diagonal, y)
        if dy is not None:
            dy.addcmul_(diagonal, x)

    def _add_right_grad(self, block: Tensor, begins: Tensor, right: Tensor, dx: Tensor) -> Tensor:
        """Add the gradient of the right halves to dx; return that of `_right_rows`, `[G x blocks, half, K]`."""
        half, dim = begins.shape[1:]
        # A 1 x 1 matrix product is a multiplication.
        multiply = torch.mul if half == 1 else torch.bmm
        dends = multiply(block, begins, out=self._scratch("dends", *begins.shape))
        dx.view(dx.shape[0], -1, 2, half, dim)[:, :, 1].addcmul_(dends.view(right.shape), right)
        return dends

    def _add_left_grad(self, block: Tensor, ends: Tensor, left: Tensor, dy: Tensor) -> Tensor:
        """Add the gradient of the left halves to dy; return that of `_left_rows`, `[G x blocks, half, K]`."""
        half, dim = ends.shape[1:]
        multiply = torch.mul if half == 1 else torch.bmm
        dbegins = multiply(block.transpose(1, 2), ends, out=self._scratch("dbegins", *ends.shape))
        dy.view(dy.shape[0], -1, 2, half, dim)[:, :, 0].addcmul_(dbegins.view(left.shape), left)
        return dbegins

    def pairs_and_decay_grad(
        self, d: Tensor, pairs: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, dg: Tensor
    ) -> None:
        self._diagonal_grad(d, x, y, dx, dy)
        for half, right, left in self._levels:
            ends, begins, block = self._right_rows(x, half, right), self._left_rows(y, half, left), self._block(d, half)
            # A decay in the right half acts on reads at its token or later, one in the left half on earlier writes.
            read = self._add_right_grad(block, begins, right, dx).mul_(ends)
            written = self._add_left_grad(block, ends, left, dy).mul_(begins)
            halves = dg.view(x.shape[0], -1, 2, half, x.shape[2])
            if half == 1:
                halves[:, :, 1] += read.view(right.shape)
                continue
            later, before = self.masks.causal[:half, :half].T, self.masks.strictly_causal[:half, :half]
            blocks = ends.shape[0]
            halves[:, :, 1] += torch.bmm(later.expand(blocks, -1, -1), read).view(right.shape)
            halves[:, :, 0] += torch.bmm(before.expand(blocks, -1, -1), written).view(left.shape)


class Decays:
    """Decays of a recurrence, chunk by chunk; full chunks of a constant decay share one object."""

    def __init__(self, log_decay: Tensor | None, loop: ChunkLoop) -> None:
        """log_decay None (no decay), `[H]` (constant), `[B, T, H]` or `[B, T, H, K]`."""
        self._dtype, self._device = loop.dtype, loop.scratch.device
        self.vector = log_decay is not None and log_decay.dim() == 4
        self.constant = log_decay is None or log_decay.dim() == 1
        if log_decay is None:
            log_decay = torch.zeros(1, dtype=loop.dtype, device=loop.scratch.device)
        if self.constant:
            log_decay = log_decay.expand(loop.batch, loop.length, -1)
        self._log_decay = log_decay if self.vector else log_decay[..., None]
        self._constant: dict[tuple[int, int, int], Decay] = {}
        self._full_masks: dict[int, ChunkMasks] = {}

    def _masks(self, chunk: Chunk) -> ChunkMasks:
        if chunk.starts:
            return ChunkMasks(chunk, self._dtype, self._device)
        if chunk.size not in self._full_masks:
            self._full_masks[chunk.size] = ChunkMasks(chunk, self._dtype, self._device)
        return self._full_masks[chunk.size]

    def for_chunk(self, loop: ChunkLoop, group: HeadGroup, chunk: Chunk) -> Decay:
        """Return the decays of a group's chunk.

        `loop` is an argument and not an attribute because it holds this object: a reference cycle would keep its
        tensors alive until garbage collection, and autograd copies gradients that have other references.
        """
        key = (group.first_head, group.size, chunk.size)
        if self.constant and not chunk.starts and key in self._constant:
            return self._constant[key]
        masks = self._masks(chunk)
        g = loop.load("log_decay", self._log_decay, group, chunk)
        # exp(MIN_LOG_DECAY) is 0 already; lower values, and -inf, would only cost the sums precision.
        g = torch.clamp(g, min=MIN_LOG_DECAY, out=loop.scratch("clamped", *g.shape))
        if self.vector:
            return VectorDecay(g, masks, loop.scratch)
        decay = ScalarDecay(g, masks, loop.scratch)
        if self.constant and not chunk.starts:
            self._constant[key] = decay
        return decay


class LogDecayGrad:
    """Gradient of a chunk's log-decays, accumulated from four terms.

    g_t acts on the intra-chunk pairs around it (`intra`, to which `Decay.pairs_and_decay_grad` adds), on reads of the
    start state at t or later (`reads`), on writes to the end state before t, and on the part of the start state that
    is kept in the end state. These terms do not cancel, unlike `q dq - k dk` summed from the end.
    """

    def __init__(self, loop: ChunkLoop, decay: Decay, keys: Tensor, dk: Tensor, state: Tensor, dstate: Tensor) -> None:
        """`dk` is the gradient of the keys as writes to the end state, whose gradient is `dstate`."""
        self._decay = decay
        self.intra = loop.scratch("dg", *keys.shape[:2], keys.shape[2] if isinstance(decay, VectorDecay) else 1).zero_()
        self.reads = loop.scratch("reads", *keys.shape).zero_()
        """Sum over a token's reads of the start state of the read vector times its gradient, `[G, C, K]`."""
        self._written = torch.mul(keys, dk, out=loop.scratch("writes", *keys.shape))
        product = torch.mul(state, dstate, out=loop.scratch("kept", *state.shape))
        self._kept = product.sum(dim=2)[:, None] * decay.keeps.transpose(1, 2).to(product.dtype)

    def finish(self) -> Tensor:
        """Return the gradient, `[G, C, 1]` or `[G, C, K]`."""
        reads, written, kept, masks = self.reads, self._written, self._kept, self._decay.masks
        if self.intra.shape[2] == 1:
            reads, written, kept = (x.sum(dim=2, keepdim=True) for x in (reads, written, kept))
        groups = self.intra.shape[0]
        self.intra.baddbmm_(masks.causal.T.expand(groups, -1, -1), reads)
        self.intra.baddbmm_(masks.strictly_causal.expand(groups, -1, -1), written)
        return self.intra.add_(kept)
