"""How decays act inside a chunk of C tokens.

With g_t <= 0 the logarithm of the decay before token t is read, and `sum(a, b)` the sum of g over a < t <= b, a chunk
needs four things of its decays, for G heads at once:

    pairs(x, y)[i, j] = sum_k x_ik y_jk exp(sum(j, i)_k)     for j <= i in one document, else 0:  [G, C, C]
    reads[i]  = exp(sum(-1, i))      what is left at token i of the state that came in, 0 behind a start
    writes[j] = exp(sum(j, C-1))     what is left at the chunk's end of what token j wrote, 0 before the last start
    keeps     = exp(sum(-1, C-1))    what is left at the chunk's end of the state that came in, 0 with a start

All exponents are sums of logarithms (for scalars differences of running sums, in float64), and none is positive:
nothing overflows, nothing cancels and nothing is divided, however strong the decay.
"""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from longctx.kernels.linear.chunking import Chunk, HeadGroup, Scratch, Walk
from longctx.kernels.linear.recurrence import document_ids

LEAST = -1e4
"""A logarithm whose exponential is 0."""


class Documents:
    """Which tokens of a chunk see which, `[C, C]`, and which touch the state, `[C, 1]`: ones and zeros."""

    def __init__(self, chunk: Chunk, dtype: torch.dtype, device: torch.device) -> None:
        ids = document_ids(chunk.size, chunk.starts, device)
        self.starts = chunk.starts
        self.same = (ids[:, None] == ids[None, :]).to(dtype)
        self.before = (ids == 0).to(dtype)[:, None]
        self.last = (ids == len(chunk.starts)).to(dtype)[:, None]
        self.lower = torch.ones_like(self.same).tril()
        self.hidden = self.same * self.lower == 0
        """`[C, C]` bool, where a row's token may not see the column's."""

    @cached_property
    def strictly_lower(self) -> Tensor:
        """`[C, C]`, 1 where a column's token comes before the row's."""
        return self.lower.tril(-1)


class Decay(ABC):
    """The decays of one chunk: reads and writes `[G, C, 1]` or `[G, C, K]`, keeps `[G, 1, 1]` or `[G, K, 1]`."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents

    @cached_property
    def reads(self) -> Tensor:
        """See the module's docstring."""
        reads = self._reads()
        return reads.mul_(self.documents.before) if self.documents.starts else reads

    @cached_property
    def writes(self) -> Tensor:
        """See the module's docstring."""
        writes = self._writes()
        return writes.mul_(self.documents.last) if self.documents.starts else writes

    @cached_property
    def keeps(self) -> Tensor:
        """See the module's docstring."""
        keeps = self._keeps()
        return keeps.zero_() if self.documents.starts else keeps

    @abstractmethod
    def _reads(self) -> Tensor: ...

    @abstractmethod
    def _writes(self) -> Tensor: ...

    @abstractmethod
    def _keeps(self) -> Tensor: ...

    @abstractmethod
    def pairs(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """See the module's docstring: x, y `[G, C, K]`, out `[G, C, C]`."""

    @abstractmethod
    def pairs_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        """Add to dx and dy the gradients of x and y for the gradient `d` of `pairs(x, y)`, which is changed.

        None is for what is not wanted.
        """

    @abstractmethod
    def pairs_and_decay_grad(
        self, d: Tensor, pairs: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, dg: Tensor
    ) -> None:
        """The same, and to dg `[G, C, 1]` or `[G, C, K]` that of the logarithms g; `pairs` is `pairs(x, y)`."""


class ScalarDecay(Decay):
    """One decay per head: pairs are a matrix product times a mask."""

    def __init__(self, g: Tensor, documents: Documents, scratch: Scratch) -> None:
        """g `[G, C, 1]`, the logarithms."""
        super().__init__(documents)
        self._dtype, self._scratch = g.dtype, scratch
        # In float64, so that a strong decay earlier in the chunk rounds nothing away in the differences.
        self._sums = g.double().cumsum(dim=1)

    def _reads(self) -> Tensor:
        return self._sums.exp().to(self._dtype)

    def _writes(self) -> Tensor:
        return (self._sums[:, -1:] - self._sums).exp_().to(self._dtype)

    def _keeps(self) -> Tensor:
        return self._sums[:, -1:].exp().to(self._dtype)

    @cached_property
    def mask(self) -> Tensor:
        """exp(sum(j, i)) for j <= i in one document, else 0: `[G, C, C]`."""
        groups, size, _ = self._sums.shape
        wide = self._scratch("distance", groups, size, size, dtype=torch.float64)
        distance = torch.sub(self._sums, self._sums.transpose(1, 2), out=wide).to(self._dtype, copy=True)
        return distance.masked_fill_(self.documents.hidden, float("-inf")).exp_()

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
        # Decay t acts on all pairs with j < t <= i.
        weights = torch.mul(d, pairs, out=self._scratch("weights", *d.shape))
        before = torch.matmul(weights, self.documents.strictly_lower.T)
        dg += before.mul_(self.documents.lower).sum(dim=1)[..., None]
        self.pairs_grad(d, x, y, dx, dy)


class VectorDecay(Decay):
    """A decay for each channel of K: pairs by halves.

    For tokens j of the left half of a block and i of its right half, `sum(j, i)` is the sum from j to the middle and
    that from the middle to i, so that the scores between the halves are one matrix product of x times the one
    exponential and y times the other, both at most 1. The halves are blocks themselves, down to single tokens: log2 C
    levels, and together no more multiplications than the half of the C x C scores that is needed. The sums of a level
    are made of those of the level below, by additions alone.
    """

    def __init__(self, g: Tensor, documents: Documents, scratch: Scratch) -> None:
        """g `[G, C, K]`, the logarithms, C a power of two. Only one such object of a `scratch` is in use at a time."""
        super().__init__(documents)
        self._g, self._scratch = g, scratch

    def _reads(self) -> Tensor:
        if "_levels" in self.__dict__:
            return self._scratch("prefix", *self._g.shape).exp_()
        return self._summed(self.documents.lower).exp_()

    def _writes(self) -> Tensor:
        if "_levels" in self.__dict__:
            return self._scratch("suffix", *self._g.shape).exp_()
        # The sum behind each token.
        return self._summed(self.documents.strictly_lower.T).exp_()

    def _summed(self, ones: Tensor) -> Tensor:
        """`ones @ g`: sums over tokens, as a product of matrices, which is faster than a running sum."""
        return torch.bmm(ones.expand(self._g.shape[0], -1, -1), self._g)

    def _keeps(self) -> Tensor:
        return self._g.sum(dim=1).exp_()[..., None]

    @cached_property
    def _levels(self) -> list[tuple[int, Tensor, Tensor]]:
        """For each size of a half: exp(sum(middle, i)) of right halves, exp(sum(j, middle)) of left ones."""
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
        """The scores of right halves with their left ones, `[G, blocks, half, half]`, as a view of `[G, C, C]`."""
        groups, size, _ = x.shape
        count = size // (2 * half)
        square = x.view(groups, count, 2 * half, count, 2 * half).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        return square[:, :, half:, :half]

    def _ends(self, x: Tensor, half: int, right: Tensor) -> Tensor:
        """x of the right halves, decayed from the middle before them: `[G x blocks, half, K]`."""
        part = x.reshape(x.shape[0], -1, 2, half, x.shape[2])[:, :, 1]
        return torch.mul(part, right, out=self._scratch("ends", *right.shape)).view(-1, half, x.shape[2])

    def _begins(self, y: Tensor, half: int, left: Tensor) -> Tensor:
        """y of the left halves, decayed to the middle behind them: `[G x blocks, half, K]`."""
        part = y.reshape(y.shape[0], -1, 2, half, y.shape[2])[:, :, 0]
        return torch.mul(part, left, out=self._scratch("begins", *left.shape)).view(-1, half, y.shape[2])

    def _block(self, d: Tensor, half: int) -> Tensor:
        """A copy of the scores of right halves with their left ones: `[G x blocks, half, half]`."""
        source = self._blocks(d, half)
        return self._scratch("block", *source.shape).copy_(source).view(-1, half, half)

    def pairs(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        out.zero_()
        product = torch.mul(x, y, out=self._scratch("product", *x.shape))
        torch.sum(product, dim=2, out=out.diagonal(dim1=1, dim2=2))
        for half, right, left in self._levels:
            ends, begins = self._ends(x, half, right), self._begins(y, half, left)
            block = self._scratch("block", ends.shape[0], half, half)
            torch.bmm(ends, begins.transpose(1, 2), out=block)
            target = self._blocks(out, half)
            target.copy_(block.view(target.shape))
        if self.documents.starts:
            out.mul_(self.documents.same)
        return out

    def pairs_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        self._diagonal_grad(d, x, y, dx, dy)
        for half, right, left in self._levels:
            block = self._block(d, half)
            if dx is not None:
                self._ends_grad(block, self._begins(y, half, left), right, dx)
            if dy is not None:
                self._begins_grad(block, self._ends(x, half, right), left, dy)

    def _diagonal_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
        if self.documents.starts:
            d.mul_(self.documents.same)
        diagonal = d.diagonal(dim1=1, dim2=2)[..., None]
        if dx is not None:
            dx.addcmul_(diagonal, y)
        if dy is not None:
            dy.addcmul_(diagonal, x)

    def _ends_grad(self, block: Tensor, begins: Tensor, right: Tensor, dx: Tensor) -> Tensor:
        """Add to dx what right halves get; their `_ends` before the decays get what comes back."""
        half, dim = begins.shape[1:]
        # Of single tokens a matrix is a number.
        multiply = torch.mul if half == 1 else torch.bmm
        dends = multiply(block, begins, out=self._scratch("dends", *begins.shape))
        dx.view(dx.shape[0], -1, 2, half, dim)[:, :, 1].addcmul_(dends.view(right.shape), right)
        return dends

    def _begins_grad(self, block: Tensor, ends: Tensor, left: Tensor, dy: Tensor) -> Tensor:
        """Add to dy what left halves get; their `_begins` before the decays get what comes back."""
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
            ends, begins, block = self._ends(x, half, right), self._begins(y, half, left), self._block(d, half)
            # A decay of the right half acts on what is read at its token or later, one of the left half on what was
            # written before it.
            read = self._ends_grad(block, begins, right, dx).mul_(ends)
            written = self._begins_grad(block, ends, left, dy).mul_(begins)
            halves = dg.view(x.shape[0], -1, 2, half, x.shape[2])
            if half == 1:
                halves[:, :, 1] += read.view(right.shape)
                continue
            later, before = self.documents.lower[:half, :half].T, self.documents.strictly_lower[:half, :half]
            blocks = ends.shape[0]
            halves[:, :, 1] += torch.bmm(later.expand(blocks, -1, -1), read).view(right.shape)
            halves[:, :, 0] += torch.bmm(before.expand(blocks, -1, -1), written).view(left.shape)


class Decays:
    """The decays of a recurrence, chunk by chunk; what whole chunks of a constant decay have in common is made once."""

    def __init__(self, log_decay: Tensor | None, walk: Walk) -> None:
        """log_decay None (no decay), `[H]` (constant), `[B, T, H]` or `[B, T, H, K]`."""
        self._dtype, self._device = walk.dtype, walk.scratch.device
        self.vector = log_decay is not None and log_decay.dim() == 4
        self.constant = log_decay is None or log_decay.dim() == 1
        if log_decay is None:
            log_decay = torch.zeros(1, dtype=walk.dtype, device=walk.scratch.device)
        if self.constant:
            log_decay = log_decay.expand(walk.batch, walk.length, -1)
        self._log_decay = log_decay if self.vector else log_decay[..., None]
        self._shared: dict[tuple[int, int, int], Decay] = {}
        self._plain: dict[int, Documents] = {}

    def _documents(self, chunk: Chunk) -> Documents:
        if chunk.starts:
            return Documents(chunk, self._dtype, self._device)
        if chunk.size not in self._plain:
            self._plain[chunk.size] = Documents(chunk, self._dtype, self._device)
        return self._plain[chunk.size]

    def of(self, walk: Walk, heads: HeadGroup, chunk: Chunk) -> Decay:
        """The decays of a piece.

        The walk is given and not kept: it holds this object, and a cycle would keep its tensors until Python looks for
        cycles; meanwhile autograd would copy gradients that someone else seems to hold.
        """
        key = (heads.first, heads.count, chunk.size)
        if self.constant and not chunk.starts and key in self._shared:
            return self._shared[key]
        documents = self._documents(chunk)
        g = walk.load("log_decay", self._log_decay, heads, chunk)
        # exp of the least is 0 in every dtype; what is below it, and -inf, would only cost the sums their precision.
        g = torch.clamp(g, min=LEAST, out=walk.scratch("clamped", *g.shape))
        if self.vector:
            return VectorDecay(g, documents, walk.scratch)
        decay = ScalarDecay(g, documents, walk.scratch)
        if self.constant and not chunk.starts:
            self._shared[key] = decay
        return decay


class GateSums:
    """The gradient of a chunk's logarithms g, gathered.

    A decay acts on the pairs around it (`dg`, where `Decay.pairs_grad` adds them), on what is read at its token or
    later of the state that came in, on what was written before it into the state that leaves, and on what of the one
    is kept in the other. None of these cancel, as `q dq - k dk` summed from the end would.
    """

    def __init__(self, walk: Walk, decay: Decay, keys: Tensor, dk: Tensor, state: Tensor, dstate: Tensor) -> None:
        """dk is what the keys get as writes into the state that leaves, whose gradient is dstate."""
        self._decay = decay
        self.dg = walk.scratch("dg", *keys.shape[:2], keys.shape[2] if isinstance(decay, VectorDecay) else 1).zero_()
        self.read = walk.scratch("reads", *keys.shape).zero_()
        """What each token reads of the state that came in, times its gradient: `[G, C, K]`, to be added to."""
        self._written = torch.mul(keys, dk, out=walk.scratch("writes", *keys.shape))
        product = torch.mul(state, dstate, out=walk.scratch("kept", *state.shape))
        self._kept = product.sum(dim=2)[:, None] * decay.keeps.transpose(1, 2)

    def finish(self) -> Tensor:
        """`[G, C, 1]` or `[G, C, K]`."""
        read, written, kept, documents = self.read, self._written, self._kept, self._decay.documents
        if self.dg.shape[2] == 1:
            read, written, kept = (x.sum(dim=2, keepdim=True) for x in (read, written, kept))
        groups = self.dg.shape[0]
        self.dg.baddbmm_(documents.lower.T.expand(groups, -1, -1), read)
        self.dg.baddbmm_(documents.strictly_lower.expand(groups, -1, -1), written)
        return self.dg.add_(kept)
