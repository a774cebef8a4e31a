"""Additive recurrence: its gate, FLOPs and decoding step, over chunkwise implementations in C++, torch and Triton."""

from typing import Any

from torch import Tensor

from longctx.kernels.linear.additive import native
from longctx.kernels.linear.checks import check_decay
from longctx.kernels.linear.operators import RegisteredRecurrence, Shape
from longctx.kernels.linear.recurrence import Inputs


class Additive(RegisteredRecurrence):
    """`S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T`; without the gate nothing decays."""

    name = "additive"
    gate_names = ("log_decay",)
    state_writes = 1

    def check_gates(self, gates: dict[str, Tensor], k: Tensor) -> None:
        """See `RegisteredRecurrence`: log_decay is `[H]`, `[B, T, H]` or `[B, T, H, K]`, at most 0."""
        if "log_decay" in gates:
            check_decay(gates["log_decay"], k, constant=True)

    def transition_dims(self, inputs: Inputs) -> tuple[int, ...]:
        """See `RegisteredRecurrence`."""
        return (inputs.k.shape[3],) if inputs.gates and inputs.gates[0].dim() == 4 else ()

    def update_state(self, state: Tensor, k: Tensor, v: Tensor, **gates: Tensor) -> Tensor:
        """See `RegisteredRecurrence`."""
        if "log_decay" in gates:
            state = decayed(state, gates["log_decay"])
        return state + k[..., None] * v[..., None, :]

    def _summarize_flops(self, q: Any, k: Shape, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return self._state_flops(k, out_shape[1])

    def _summarize_grad_flops(self, q: Shape, k: Shape, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return self._read_flops(q, k, out_shape[1])


def decayed(state: Tensor, log_decay: Tensor) -> Tensor:
    """Multiply a state `[B, H, K, V]` by the decay of one token; log_decay `[B, H]` or `[B, H, K]`."""
    decay = log_decay.exp()
    return state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])


ADDITIVE = Additive(native, "longctx.kernels.linear.additive.triton")
"""Linear attention, lightning, retention, simple GLA, Mamba-2, GLA, HGRN-2, LightNet."""
