"""What the comparisons with other projects share: finding the peer, its precision, and the comparison itself."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode

from longctx.kernels.linear import reference
from longctx.kernels.linear.api import linear_attention, step
from longctx.kernels.linear.recurrence import state_heads

LENGTHS = [1, 45, 130]
"""One token, less than any chunk of ours or of a peer, and chunks with a rest."""

OLDEST = {"deepspeed": "0.19.8", "fla": "0.6", "transformers": "5.23"}
"""Before 5.23 transformers normalizes Mamba-2 over all groups at once, and its kernel functions differ."""
EXTRA = {"deepspeed": "deepspeed", "fla": "compare", "transformers": "compare"}


def peer(module):
    """A module of a peer; where that is not installed or too old, the tests of the file that asks are skipped."""
    name = module.partition(".")[0]
    reason = f"pip install -e '.[{EXTRA[name]}]' to compare with {name}, {OLDEST[name]} or later"
    pytest.importorskip(name, OLDEST[name], reason)
    return pytest.importorskip(module)


class _Float64(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    """The peers cast to float32 inside. Here that means float64, so that they have to agree to 1e-11, not 1e-5."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


def without_kernels(monkeypatch, module):
    """Let a modeling file of transformers compute in plain torch.

    Where fla, causal-conv1d or mamba-ssm are installed, its functions have been wrapped to call their kernels, which
    do not run on a CPU. What was wrapped is what they fall back to otherwise.
    """
    for name, f in list(vars(module).items()):
        if inspect.isfunction(f) and f.__module__ == module.__name__:
            monkeypatch.setattr(module, name, inspect.unwrap(f))


def by_reference(q, k, v, log_decay=None, beta=None, *, scale=1.0, initial_state=None):
    """o and the end state by the token-by-token reference."""
    return reference.linear_recurrence(scale * q, k, v, log_decay, beta, initial_state=initial_state)


def by_chunks(q, k, v, log_decay=None, beta=None, *, scale=1.0, initial_state=None):
    """o and the end state by the public function."""
    return linear_attention(q, k, v, log_decay, beta, scale=scale, initial_state=initial_state, final_state=True)


def by_steps(q, k, v, log_decay=None, beta=None, *, scale=1.0, initial_state=None, prompt=0):
    """o and the end state by one-token steps, after a prompt that is read at once."""

    def at(tokens):
        """All that goes in, at some of the tokens."""
        return (x if x is None or x.dim() == 1 else x[:, tokens] for x in (scale * q, k, v, log_decay, beta))

    outs, state = [], initial_state
    if state is None:
        heads = state_heads(k, v, [x for x in (log_decay, beta) if x is not None])
        state = q.new_zeros(q.shape[0], heads, q.shape[3], v.shape[3])
    if prompt:
        out, state = by_chunks(*at(slice(prompt)), initial_state=state)
        outs.append(out)
    for t in range(prompt, q.shape[1]):
        q_t, k_t, v_t, *gates = at(t)
        out, state = step(q_t, k_t, v_t, state, *gates)
        outs.append(out[:, None])
    return torch.cat(outs, dim=1), state


OURS = {"reference": by_reference, "chunks": by_chunks, "steps": by_steps}
"""The three forms in which longctx computes a linear recurrence."""
each_of_ours = pytest.mark.parametrize("ours", OURS.values(), ids=OURS.keys())


def with_gradients(function, leaves, cotangents):
    """The outputs of a function of named tensors, and the gradient of each tensor under its name with a d."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    outputs = function(**leaves)
    outputs = {name: x for name, x in zip(("o", "end"), outputs, strict=True) if x is not None}
    torch.autograd.backward(list(outputs.values()), [cotangents[name] for name in outputs])
    grads = {f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return {name: x.detach() for name, x in outputs.items()} | grads


def check(got, want, bound):
    """Every tensor of one dictionary is that of the other: the same shape and dtype, and within a share of its norm."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
        distance = (got[name].double() - x.double()).norm().item()
        assert distance <= bound * x.double().norm().item(), (name, distance / max(x.norm().item(), 1e-300))
