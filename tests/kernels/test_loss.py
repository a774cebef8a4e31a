"""The tiled cross-entropy against the dense one."""

import pytest
import torch

from longctx.kernels import reference
from longctx.kernels.loss import IGNORE, linear_cross_entropy


def draw(length=37, dim=6, vocab=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(length, dim, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, dim, generator=generator, dtype=dtype)
    labels = torch.randint(0, vocab, (length,), generator=generator)
    labels[::5] = IGNORE
    return x, weight, labels


@pytest.mark.parametrize("tile", [1, 8, 37, 1000])
def test_loss_and_gradients_equal_the_dense_ones(tile):
    x, weight, labels = draw()
    dense = [t.clone().requires_grad_() for t in (x, weight)]
    want = reference.linear_cross_entropy(*dense, labels)
    (want.sum() / 3).backward()
    tiled = [t.clone().requires_grad_() for t in (x, weight)]
    total, nll = linear_cross_entropy(*tiled, labels, tile)
    (total / 3).backward()
    torch.testing.assert_close(nll, want.detach())
    torch.testing.assert_close(total, want.sum())
    for got, leaf in zip(tiled, dense, strict=True):
        torch.testing.assert_close(got.grad, leaf.grad)


def test_tokens_without_label_weigh_nothing():
    x, weight, labels = draw()
    x.requires_grad_()
    total, nll = linear_cross_entropy(x, weight, torch.full_like(labels, IGNORE), 8)
    total.backward()
    assert total == 0
    assert not nll.any()
    assert not x.grad.any()


def test_scale_multiplies_the_gradients_before_they_are_rounded():
    x, weight, labels = draw(dtype=torch.float32)
    low = [t.bfloat16().requires_grad_() for t in (x, weight)]
    total, _ = linear_cross_entropy(*low, labels, 8, scale=1 / 1013)
    total.backward()
    exact = [t.detach().double().requires_grad_() for t in low]
    (reference.linear_cross_entropy(*exact, labels).sum() / 1013).backward()
    for got, want in zip(low, exact, strict=True):
        # Rounded after the fact, 1/1013 alone would be off by 0.33 % in all of them together.
        ratio = (got.grad.double() * want.grad).sum() / want.grad.square().sum()
        assert abs(ratio - 1) < 1e-3


def test_bfloat16_gives_a_float32_loss():
    x, weight, labels = draw(dtype=torch.float32)
    low = [t.bfloat16().requires_grad_() for t in (x, weight)]
    total, nll = linear_cross_entropy(*low, labels, 8)
    total.backward()
    assert total.dtype == nll.dtype == torch.float32
    assert low[0].grad.dtype == torch.bfloat16
    want = reference.linear_cross_entropy(*(t.detach().float() for t in low), labels).sum()
    assert abs(total.item() / want.item() - 1) < 1e-2


def test_no_gradient_is_made_where_none_is_asked_for():
    x, weight, labels = draw()
    with torch.no_grad():
        total, _ = linear_cross_entropy(x, weight, labels, 8)
    torch.testing.assert_close(total, reference.linear_cross_entropy(x, weight, labels).sum())


def test_wrong_number_of_labels_is_refused():
    x, weight, labels = draw()
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(x, weight, labels[1:], 8)
