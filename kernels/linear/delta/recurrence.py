"""Delta rule: its gates, FLOPs and decoding step, over the chunkwise implementations in C++, torch and Triton."""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear.additive.recurrence import decayed
from longctx.kernels.linear.checks import check_beta, check_decay
from longctx.kernels.linear.delta import native
from longctx.kernels.linear.operators import RegisteredRecurrence, Shape
from longctx.kernels.linear.recurrence import Inputs


class DeltaRule(RegisteredRecurrence):
    """`S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T`; log_decay is optional."""

    name = "delta"
    gate_names = ("beta", "log_decay")
    required_gates = 1
    prepares = True
    state_writes = 2  # the state is read at the key first

    def check_gates(self, gates: dict[str, Tensor], k: Tensor) -> None:
        """See `RegisteredRecurrence`: beta is `[B, T, H]`, log_decay `[B, T, H]` or `[B, T, H, K]`, at most 0."""
        check_beta(gates["beta"], k)
        if "log_decay" in gates:
            check_decay(gates["log_decay"], k, constant=False)

    def transition_dims(self, inputs: Inputs) -> tuple[int, ...]:
        """See `RegisteredRecurrence`."""
        return inputs.k.shape[3], inputs.k.shape[3]

    def update_state(self, state: Tensor, k: Tensor, v: Tensor, **gates: Tensor) -> Tensor:
        """See `RegisteredRecurrence`."""
        if "log_decay" in gates:
            state = decayed(state, gates["log_decay"])
        u = gates["beta"][..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, state))
        return state + k[..., None] * u[..., None, :]

    # A summary carries the transition matrix as K more value channels.

    def _summarize_flops(self, q: Any, k: Shape, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return self.state_writes * self._state_flops(k, _with_transition(out_shape[1]))

    def _summarize_grad_flops(self, q: Shape, k: Shape, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        writes = self.state_writes * self._state_flops(k, _with_transition(out_shape[1]))
        return self._read_flops(q, k, out_shape[1]) + writes


def _with_transition(states: Shape) -> Shape:
    return (*states[:4], states[4] + states[3])


DELTA = DeltaRule(native, "longctx.kernels.linear.delta.triton")
"""DeltaNet, Gated DeltaNet, KDA."""
