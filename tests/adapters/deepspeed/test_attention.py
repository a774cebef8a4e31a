"""The class that takes the place of DeepSpeed's DistributedAttention."""

import inspect

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed", reason="needs the extra: pip install -e '.[deepspeed]'")

from longctx.adapters.deepspeed import DistributedAttention

LENGTH = 24


def test_it_is_made_and_called_as_deepspeeds():
    from deepspeed.sequence.layer import DistributedAttention as Theirs

    for name in ("__init__", "forward"):
        theirs, ours = (list(inspect.signature(getattr(c, name)).parameters) for c in (Theirs, DistributedAttention))
        assert ours == theirs


def local(q, k, v, sequence_dim, together):
    """Causal attention of a whole sequence."""
    q, k, v = (x if sequence_dim == 1 else x.transpose(0, 1) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    out = out if sequence_dim == 1 else out.transpose(0, 1)
    return out.flatten(2) if together else out


def draw(heads, kv_heads, sequence_dim):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, n, 6) for n in (heads, kv_heads, kv_heads, heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x if sequence_dim == 1 else x.transpose(0, 1) for x in tensors]


def on_rank(heads, kv_heads, sequence_dim, together):
    rank, size = dist.get_rank(), dist.get_world_size()
    *leaves, do = (x.chunk(size, sequence_dim)[rank] for x in draw(heads, kv_heads, sequence_dim))
    leaves = [x.clone().requires_grad_() for x in leaves]
    attention = DistributedAttention(local, dist.group.WORLD, 2, sequence_dim)
    out = attention(*leaves, 1 - sequence_dim, None, sequence_dim, together)
    out.backward(do.flatten(2) if together else do)
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("sequence_dim", [0, 1])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (4, 1), (12, 3)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_over_ranks_it_is_the_local_attention(ranks, size, heads, kv_heads, sequence_dim, together):
    *leaves, do = draw(heads, kv_heads, sequence_dim)
    leaves = [x.clone().requires_grad_() for x in leaves]
    want = local(*leaves, sequence_dim, together)
    want.backward(do.flatten(2) if together else do)
    answers = ranks.run(on_rank, heads, kv_heads, sequence_dim, together, size=size)
    for parts, ref in zip(zip(*answers, strict=True), (want.detach(), *(x.grad for x in leaves)), strict=True):
        got = torch.cat(parts, dim=sequence_dim)
        assert (got - ref).norm() <= 1e-10 * ref.norm()


def refusals():
    attention = DistributedAttention(local, dist.group.WORLD)
    q, k, v, _ = draw(8, 2, 0)
    messages = []
    for arguments in ((q, k, v, 0), (q, k, v, 1, "rotary"), (q[:, :, :7], k, v, 1)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
            attention(*arguments)
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused(ranks):
    dims, rotary, heads = ranks.run(refusals, size=2)[0]
    assert "batch_dim_idx is 0: expected 1, since the sequence is dim 0" in dims
    assert "rotary_pos_emb: apply rotary embeddings to query and key before" in rotary
    assert "7 query heads do not divide over 2 ranks" in heads
    with pytest.raises(ValueError, match="sp_stream"):
        DistributedAttention(local, None, sp_stream="a stream")
    with pytest.raises(ValueError, match="scatter_idx 1 and gather_idx 2"):
        DistributedAttention(local, None, 1, 2)
