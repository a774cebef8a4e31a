"""A layer of transformers against the same layer written out with a recurrence of ours."""

import torch

from tests.compare.peers import check, in_float64

DIM = 12


def redraw(module):
    """Weights of chance for every parameter, so that none is one that changes nothing (a scale of 1, a bias of 0)."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        fan_in = p[0].numel() if p.dim() == 2 else 1
        p.data = 0.6 * fan_in**-0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def built(kind, config, layer=0):
    """Their layer with weights of chance in float64."""
    with in_float64():
        layer = kind(config, layer)
    return redraw(layer.double().eval())


def causal_convolution(x, weight, bias=None):
    """Depthwise over the tokens: `y_t = sum_j weight_j x_{t-J+1+j} + bias`, for x `[B, T, D]` and weight `[D, J]`."""
    taps = weight.shape[1]
    padded = torch.cat([x.new_zeros(x.shape[0], taps - 1, x.shape[2]), x], dim=1)
    out = sum(padded[:, j : j + x.shape[1]] * weight[:, j] for j in range(taps))
    return out if bias is None else out + bias


def unit(x):
    """Of length 1 over the last dimension, but for the epsilon that they add under the root."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def rms_norm(x, norm):
    """Over the last dimension, with the epsilon and the weight of their module; it may be cut into several."""
    normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon)
    return normed * norm.weight.view(-1, x.shape[-1])


def draw(length, dtype=torch.float64):
    """What goes into a layer and a gradient of what comes out, `[2, length, DIM]`."""
    generator = torch.Generator().manual_seed(length)
    x, dy = (torch.randn(2, length, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), dy.to(dtype)


def outcome(forward, layer, x, dy):
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    named = {"x": x, **dict(layer.named_parameters())}
    y = forward(x)
    grads = torch.autograd.grad(y, list(named.values()), dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(named, grads, strict=True)}


def check_layer(theirs, written_out, layer, ours, length):
    """In float64 to 1e-11, and in float32, as they compute it, to 1e-5."""
    x, dy = draw(length)
    with in_float64():
        want = outcome(lambda x: theirs(layer, x), layer, x, dy)
    check(outcome(lambda x: written_out(layer, x, ours), layer, x, dy), want, 1e-11)
    layer.float()
    x, dy = draw(length, torch.float32)
    want = outcome(lambda x: theirs(layer, x), layer, x, dy)
    check(outcome(lambda x: written_out(layer, x, ours), layer, x, dy), want, 1e-5)


def check_generation(read, written_out, layer, by_steps, prompt, steps):
    """A prompt and then one token at a time through their cache; `read` takes tokens, and has the cache."""
    x, _ = draw(prompt + steps)
    with torch.no_grad():
        with in_float64():
            want = torch.cat([read(part) for part in x.split([prompt] + [1] * steps, dim=1)], dim=1)
        got = written_out(layer, x, by_steps)
    check({"y": got}, {"y": want}, 1e-11)
