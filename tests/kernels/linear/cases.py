"""Every kind of linear recurrence, with tensors of chance and what the reference makes of them."""

from dataclasses import dataclass, replace

import torch

from longctx.kernels.linear import reference
from longctx.kernels.linear.additive import ADDITIVE
from longctx.kernels.linear.delta import DELTA
from longctx.kernels.linear.recurrence import Inputs

KINDS = {
    "no decay": (ADDITIVE, None),
    "constant": (ADDITIVE, "constant"),
    "scalar": (ADDITIVE, "scalar"),
    "vector": (ADDITIVE, "vector"),
    "delta": (DELTA, None),
    "delta, scalar": (DELTA, "scalar"),
    "delta, vector": (DELTA, "vector"),
}
"""The recurrence, and its decay."""

GROUPS = {
    "one each": (3, 3, 3, 3),
    "more queries": (6, 3, 3, 3),
    "fewer values": (4, 4, 2, 4),
    "fewer queries and keys, as in Mamba-2": (2, 2, 6, 6),
    "one query": (1, 4, 4, 2),
    "fewer keys and values, as in GQA": (6, 2, 2, 2),
    "gates alone": (4, 1, 2, 4),
    "more than are taken together": (9, 9, 9, 9),
}
"""Heads of q, k, v and the gates."""


@dataclass(frozen=True)
class Case:
    """The tensors of one recurrence: what goes in and the gradients of what comes out."""

    kind: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: tuple[torch.Tensor, ...]
    state: torch.Tensor
    do: torch.Tensor
    dend: torch.Tensor

    @property
    def recurrence(self):
        return KINDS[self.kind][0]

    @property
    def tokens(self):
        """All that runs along the sequence or is constant over it."""
        return (self.q, self.k, self.v, *self.gates)

    def to(self, dtype):
        """With the tokens in a dtype, gates and states in the one that states have then."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tokens = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "do")}
        states = {name: getattr(self, name).to(wide) for name in ("state", "dend")}
        return replace(self, gates=tuple(g.to(wide) for g in self.gates), **tokens, **states)

    def cut(self, begin, end):
        """Tokens `begin` to `end`."""
        tokens = {name: getattr(self, name)[:, begin:end] for name in ("q", "k", "v", "do")}
        return replace(self, gates=tuple(g if g.dim() == 1 else g[:, begin:end] for g in self.gates), **tokens)


def draw(kind, length, batch=2, heads=GROUPS["one each"], key_dim=5, value_dim=7, strong=False):
    """float64 tensors; `strong`: a fifth of the decays is exp(-1e4)."""
    generator = torch.Generator().manual_seed(length)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    recurrence, decay = KINDS[kind]
    q_heads, k_heads, v_heads, gate_heads = heads
    q, k, v = (randn(batch, length, n, d) for n, d in ((q_heads, key_dim), (k_heads, key_dim), (v_heads, value_dim)))
    gates = []
    if recurrence is DELTA:
        k = torch.nn.functional.normalize(k, dim=-1)
        gates.append(2 * rand(batch, length, gate_heads))
    if decay is not None:
        along = {"constant": (gate_heads,), "scalar": (batch, length, gate_heads)}
        g = -rand(*along.get(decay, (batch, length, gate_heads, key_dim)))
        gates.append(torch.where(rand(*g.shape) < 0.2, -1e4, g) if strong else g)
    n = max(k_heads, v_heads, *(gate_heads for _ in gates))
    state, dend = (randn(batch, n, key_dim, value_dim) for _ in range(2))
    return Case(kind, q, k, v, tuple(gates), state, randn(batch, length, max(n, q_heads), value_dim), dend)


def named_gates(case, gates):
    """The gates by the names that the reference gives them."""
    names = ["beta", "log_decay"] if case.recurrence is DELTA else ["log_decay"]
    return dict(zip(names, gates, strict=False))


def by_reference(case, starts):
    """o, the end state and the gradients of q, k, v, the gates and the start state, by autograd through the loop."""
    leaves = [x.clone().requires_grad_() for x in (*case.tokens, case.state)]
    q, k, v, *gates, state = leaves
    out, end = reference.linear_recurrence(q, k, v, **named_gates(case, gates), starts=starts, initial_state=state)
    torch.autograd.backward([out, end], [case.do, case.dend])
    # What nothing reads has no gradient in autograd's eyes.
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    names = ["dq", "dk", "dv", *(f"d{name}" for name in named_gates(case, gates)), "dstate"]
    return {"o": out.detach(), "end": end.detach(), **dict(zip(names, grads, strict=True))}


def by_recurrence(case, segments, gate_grads=True, module=None):
    """The same by a recurrence's functions, for one segment or for several that follow each other, scanned here."""
    from longctx.kernels.linear.recurrence import exclusive_scan

    r = module or case.recurrence
    q, k, v, gates = case.q, case.k, case.v, case.gates
    carries = r.summarize(Inputs(None, k, v, gates), segments)
    *states, end = exclusive_scan([carries[n] for n in range(len(segments))], case.state)
    out, ends = r.apply(Inputs(q, k, v, gates), segments, torch.stack(states))
    backward = r.summarize_grad(Inputs(q, k, v, gates), segments, case.do)
    order = reversed(range(len(segments)))
    *flowing, dstate = exclusive_scan([backward[n] for n in order], case.dend)
    dq, dk, dv, dgates, dstates = r.apply_grad(
        Inputs(q, k, v, gates), segments, case.do, torch.stack(states), torch.stack(flowing[::-1]), gate_grads
    )
    named = {f"d{name}": g for name, g in named_gates(case, dgates).items()}
    result = {"o": out, "end": end, "dq": dq, "dk": dk, "dv": dv, **named, "dstate": dstate}
    # What the second pass says of the states is what the first pass said.
    return result, {"ends": (ends[-1], end), "dstates": (dstates[0], dstate)}


def relative(x, ref):
    return ((x - ref).norm() / ref.norm().clamp(min=1e-30)).item()
