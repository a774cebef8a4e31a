"""Linear recurrences whose inputs are not all finite: NaN and infinity reach what the equations let them reach.

k, v or gates of a token that are not finite make the state NaN until the document ends, and with it the outputs of the
token and of later ones of its document. q and the gradient of an output concern their own token and, backward, the
gradients of its document's tokens up to it. Nothing else changes by a bit (`longctx.kernels.finite` says how).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.finite import all_finite, bad_rows, per_head, without
from longctx.kernels.linear.recurrence import Carry, Inputs, Segment, document_ids

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "summarize": (),
    "apply": ("states",),
    "summarize_grad": ("do",),
    "apply_grad": ("do", "states", "dends"),
    "query_grad": ("do", "states"),
    "key_value_grad": ("do", "dends"),
}
"""The tensors that each pass takes after inputs and segments.

`prepare` is no pass, and is not checked: the rows that nobody reads of its results are not initialised.
"""


def contained(
    function: str,
    run: Callable[..., Any],
    inputs: Inputs,
    segments: Sequence[Segment],
    *rest: Any,
    gate_names: Sequence[str],
    keyed: bool,
) -> Any:
    """Return `run(inputs, segments, *rest)`, the pass `function` of a `LinearRecurrence`, with NaN where it belongs.

    `keyed`: the transition depends on the keys (the delta rule).
    """
    result = run(inputs, segments, *rest)
    if all_finite(*_computed(result, segments)):
        return result
    names = ARGUMENTS[function]
    given = dict(zip(names, rest, strict=False))
    bad = _Bad(inputs, segments, given, gate_names, keyed)
    if not bad.any():
        return result
    result = run(bad.cleaned(), segments, *(bad.clean(name, given[name]) for name in names), *rest[len(names) :])
    bad.mark(function, result)
    return result


def _computed(result: Any, segments: Sequence[Segment]) -> list[Tensor]:
    """Return what a pass has computed: of tensors that run along the sequence, the tokens in segments."""
    if isinstance(result, Carry):
        return [result.state]
    tensors = [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]
    # States and their gradients have five dims, the gradients of gates are NaN only where dk is.
    return [part for x in tensors for part in ([x] if x.dim() == 5 else [x[:, s.at] for s in segments])]


class _Bad:
    """Which tokens `[B, T, H]` and states `[N, B, H]` of a pass are not finite, and what they reach."""

    def __init__(
        self,
        inputs: Inputs,
        segments: Sequence[Segment],
        given: dict[str, Tensor],
        gate_names: Sequence[str],
        keyed: bool,
    ) -> None:
        self.inputs, self.segments, self.keyed = inputs, segments, keyed
        batch, self.heads, _, _ = inputs.state_shape
        self.nothing = torch.zeros(batch, inputs.k.shape[1], self.heads, dtype=torch.bool, device=inputs.k.device)
        self.no_state = self.nothing.new_zeros(len(segments), batch, self.heads)
        self.rows = {"k": bad_rows(inputs.k), "v": bad_rows(inputs.v)}
        if inputs.q is not None:
            self.rows["q"] = bad_rows(inputs.q)
        self.rows |= {name: bad_rows(x) for name, x in given.items() if name == "do"}
        self.states = {name: bad_rows(x.flatten(-2)) for name, x in given.items() if name != "do"}
        self.gates = [_bad_gate(name, gate) for name, gate in zip(gate_names, inputs.gates, strict=False)]

    def any(self) -> bool:
        """Whether anything is not finite."""
        return any(bool(bad.any()) for bad in (*self.rows.values(), *self.states.values(), *self.gates))

    def cleaned(self) -> Inputs:
        """Return the inputs with 0 where they are not finite, without what was prepared of them."""
        x = self.inputs
        q = None if x.q is None else without(x.q, self.rows["q"])
        gates = tuple(gate.masked_fill(bad, 0) for gate, bad in zip(x.gates, self.gates, strict=True))
        k, v = without(x.k, self.rows["k"]), without(x.v, self.rows["v"])
        return replace(x, q=q, k=k, v=v, gates=gates, prepared=())

    def clean(self, name: str, x: Tensor) -> Tensor:
        """Return an argument after the inputs with 0 where it is not finite."""
        if name == "do":
            return without(x, self.rows[name])
        return x.masked_fill(self.states[name][..., None, None], 0)

    def _of_heads(self, name: str) -> Tensor:
        return per_head(self.rows[name], self.heads) if name in self.rows else self.nothing

    def _of_gates(self) -> Tensor:
        bad = self.nothing
        for gate in self.gates:
            by_token = gate.expand_as(bad) if gate.dim() == 1 else gate if gate.dim() == 3 else gate.any(dim=-1)
            bad = bad | per_head(by_token, self.heads)
        return bad

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the tokens that read a bad state or write one, `[B, T, H]`, and which end states are bad."""
        sources = self._of_heads("k") | self._of_heads("v") | self._of_gates()
        return self._spread(sources, self.states.get("states", self.no_state), reverse=False)

    def backward(self) -> tuple[Tensor, Tensor]:
        """Return the tokens from which a bad gradient of a state comes, and which of start states are bad."""
        sources = self._of_heads("q") | self._of_heads("do") | self._of_gates()
        if self.keyed:
            sources = sources | self._of_heads("k")
        return self._spread(sources, self.states.get("dends", self.no_state), reverse=True)

    def _spread(self, sources: Tensor, edge: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """Spread bad tokens to the end of their documents (`reverse`: to the start), beginning with the state `edge`.

        Returns the tokens and the states on the other side.
        """
        reached, other = torch.zeros_like(sources), torch.zeros_like(edge)
        for number, segment in enumerate(self.segments):
            ids = document_ids(segment.size, segment.starts, sources.device)
            bad, entered = sources[:, segment.at], ids == (len(segment.starts) if reverse else 0)
            if reverse:
                bad, ids, entered = bad.flip(1), ids.flip(0), entered.flip(0)
            sums = bad.cumsum(dim=1)
            new = torch.ones_like(entered)
            new[1:] = ids[1:] != ids[:-1]
            first = torch.where(new, torch.arange(segment.size, device=ids.device), 0).cummax(dim=0).values
            seen = sums > (sums - bad.long())[:, first]
            seen |= entered[None, :, None] & edge[number][:, None]
            if segment.size:
                passes = not (reverse and segment.starts[:1] == (0,))
                other[number] = seen[:, -1] if passes else False
            elif not segment.starts:
                other[number] = edge[number]
            reached[:, segment.at] = seen.flip(1) if reverse else seen
        return reached, other

    def mark(self, function: str, result: Any) -> None:
        """Set to NaN, in place, what is bad in the result of a pass."""
        if function == "summarize":
            _mark_states(result.state, self.forward()[1])
        elif function == "summarize_grad":
            _mark_states(result.state, self.backward()[1])
        elif function == "apply":
            out, ends = result
            reached, bad_ends = self.forward()
            _mark(out, per_head(reached, out.shape[2]) | per_head(self.rows["q"], out.shape[2]))
            _mark_states(ends, bad_ends)
        elif function == "query_grad":
            self._mark_queries(result)
        elif function == "key_value_grad":
            self._mark_keys(*result)
        else:
            dq, dk, dv, dgates, dstates = result
            self._mark_queries(dq)
            self._mark_keys(dk, dv, dstates)
            gates = self.forward()[0] | self.backward()[0]
            for grad in dgates:
                if grad is not None and grad.dim() == 1:
                    grad[per_head(gates, grad.shape[0]).flatten(0, 1).any(dim=0)] = float("nan")
                elif grad is not None:
                    _mark(grad, per_head(gates, grad.shape[2]))

    def _mark_queries(self, dq: Tensor) -> None:
        do = self.rows["do"]
        reached = per_head(self.forward()[0], do.shape[2]) | do
        _mark(dq, per_head(reached, dq.shape[2]))

    def _mark_keys(self, dk: Tensor, dv: Tensor, dstates: Tensor) -> None:
        reached, starts = self.backward()
        of_keys = reached | (self.forward()[0] if self.keyed else self._of_heads("v"))
        _mark(dk, per_head(of_keys, dk.shape[2]))
        _mark(dv, per_head(reached | self._of_heads("k"), dv.shape[2]))
        _mark_states(dstates, starts)


def _bad_gate(name: str, gate: Tensor) -> Tensor:
    """Return which numbers of a gate are not finite; a log-decay of -inf is a decay."""
    return gate.isnan() | (gate == float("inf")) if name == "log_decay" else ~gate.isfinite()


def _mark(x: Tensor, bad: Tensor) -> None:
    """Set rows of `[B, T, H]` or `[B, T, H, D]` to NaN."""
    x.masked_fill_(bad if x.dim() == 3 else bad[..., None], float("nan"))


def _mark_states(states: Tensor, bad: Tensor) -> None:
    states.masked_fill_(bad[..., None, None], float("nan"))
