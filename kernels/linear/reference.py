"""Reference linear recurrence: the equation, token by token.

Dtype-preserving and differentiable by autograd, so that a float64 `gradcheck` is meaningful. Tests, and
`longctx.verify.equations`, compare the fast implementations with it.
"""

import torch
from torch import Tensor


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    starts: tuple[int, ...] = (),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute any linear mixer's recurrence with a matrix state, token by token.

    `S_t = A_t S_{t-1} + k_t w_t^T`, `o_t = S_t^T q_t`. With `D_t = diag(exp(log_decay_t))`, 1 where it is absent:
    additive (beta absent): `A_t = D_t`, `w_t = v_t`: linear attention, lightning, retention, Mamba-2, GLA;
    delta rule: `A_t = (I - beta_t k_t k_t^T) D_t`, `w_t = beta_t v_t`: the value that the decayed state stores for k_t
    moves towards v_t by the fraction beta_t (DeltaNet, Yang et al. 2024, eq. 5; Gated DeltaNet, 2025, eq. 10; Kimi
    Linear, 2025, eq. 1). Where a document starts, S is zero before the token writes to it.

    Shapes: q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]`, log_decay `[H]`, `[B, T, H]` or `[B, T, H, K]`,
    beta `[B, T, H]`, initial_state `[B, H, K, V]`. Head counts of k, v and the gates divide H, the largest of them;
    Hq is a divisor or a multiple of H.
    Returns o `[B, T, max(Hq, H), V]` and the state after the last token `[B, H, K, V]`.
    """
    batch, length, _, key_dim = q.shape
    gates = [x for x in (log_decay, beta) if x is not None]
    heads = max([k.shape[2], v.shape[2], *(x.shape[0] if x.dim() == 1 else x.shape[2] for x in gates)])
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    q = q.repeat_interleave(max(1, heads // q.shape[2]), dim=2)
    decay = q.new_ones(batch, length, heads, 1)
    if log_decay is not None:
        per_token = log_decay.expand(batch, length, -1) if log_decay.dim() == 1 else log_decay
        per_token = per_token[..., None] if per_token.dim() == 3 else per_token
        decay = per_token.to(q.dtype).exp().repeat_interleave(heads // per_token.shape[2], dim=2)
    strength = None if beta is None else beta.to(q.dtype).repeat_interleave(heads // beta.shape[2], dim=2)
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(length):
        state = torch.zeros_like(state) if t in starts else state * decay[:, t, :, :, None]
        write = v[:, t]
        if strength is not None:
            write = strength[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * write[:, :, None, :]
        read = state.repeat_interleave(q.shape[2] // heads, dim=1)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], read))
    return torch.stack(out, dim=1) if out else q.new_zeros(batch, 0, q.shape[2], v.shape[-1]), state
