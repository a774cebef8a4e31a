"""The decoder: its losses, packed documents, causality over ranks, what memory is traded for, its work."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from longctx.mixers import lightning, softmax
from longctx.model.decoder import count_parameters
from longctx.parallel.layout import Layout
from tests.combinations import mostly_slow
from tests.mixers.cases import causal_document_mask
from tests.model.cases import VOCABULARY, decoder, hybrid, recomputed, tokens, with_experts
from tests.parallel.cases import PACKINGS, layout_here

BOUNDS = (0, 1, 17, 30)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss_tile", [1, 7, 4096])
def test_losses_are_the_cross_entropy_of_the_logits(tied, loss_tile):
    model, layout = decoder(hybrid(tie_embeddings=tied)), Layout(BOUNDS)
    x, labels = tokens(30, batch=2), tokens(30, batch=2, seed=1)
    labels[:, ::4] = -100
    logits = model(x, layout)
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view(2, 30)
    want_grads = torch.autograd.grad(want.sum(), list(model.parameters()))
    total, nll, _ = model(x, layout, labels, loss_tile=loss_tile)
    torch.testing.assert_close(nll, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, want.sum(), rtol=1e-12, atol=1e-12)
    for grad, want_grad in zip(torch.autograd.grad(total, list(model.parameters())), want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-11)


def test_tied_embeddings_are_one_matrix_and_untied_ones_two():
    tied, untied = decoder(hybrid()), decoder(hybrid(tie_embeddings=False))
    assert tied.head_weight is tied.embedding.weight
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert sizes[1] - sizes[0] == VOCABULARY * 12
    assert sizes == [count_parameters(hybrid(tie_embeddings=tie), VOCABULARY) for tie in (True, False)]
    with torch.no_grad():
        untied.head.weight.zero_()
    assert not untied(tokens(5), Layout((0, 5))).any()


@pytest.mark.parametrize("bounds", PACKINGS.values(), ids=PACKINGS.keys())
def test_packed_documents_are_as_they_would_be_one_by_one(bounds):
    model, x = decoder(hybrid()), tokens(bounds[-1])
    alone = [model(x[:, begin:end], Layout((0, end - begin))) for begin, end in itertools.pairwise(bounds)]
    torch.testing.assert_close(model(x, Layout(bounds)), torch.cat(alone, dim=1), rtol=1e-10, atol=1e-11)


def logits_around(bounds, order, times, arrangement):
    layout = layout_here(bounds, order)
    model, x = decoder(hybrid(depth=4, block=arrangement), torch.float32), tokens(bounds[-1])
    answers = []
    with torch.no_grad():
        for t in (None, *times):
            changed = x.clone()
            if t is not None:
                changed[:, t] = (changed[:, t] + 11) % VOCABULARY
            answers.append(model(layout.shard(changed), layout))
    return answers


@pytest.mark.parametrize("arrangement", ["sequential", "parallel"])
@pytest.mark.parametrize("order", mostly_slow(["contiguous", "zigzag"], "zigzag"))
@pytest.mark.parametrize("bounds", mostly_slow([(0, 48), (0, 17, 48)], (0, 17, 48)), ids=["one document", "packed"])
def test_changing_a_token_leaves_earlier_logits_on_all_ranks_bitwise_unchanged(ranks, bounds, order, arrangement):
    times = (0, 13, 17, 36, 47)
    layout = Layout(bounds, order, 4)
    answers = ranks.run(logits_around, bounds, order, times, arrangement, size=4)
    before, *after = (layout.unshard(parts) for parts in zip(*answers, strict=True))
    for t, changed in zip(times, after, strict=True):
        assert torch.equal(before[:, :t], changed[:, :t]), t
        assert not torch.equal(before[:, t], changed[:, t]), t
        end = min(bound for bound in bounds if bound > t)
        assert not torch.equal(before[:, end - 1], changed[:, end - 1]), t
        assert torch.equal(before[:, end:], changed[:, end:]), t


def loss_and_gradients(model, x, labels):
    total, *_ = model(x, Layout(BOUNDS), labels)
    return total.detach(), torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize(("recompute", "tile"), [(True, None), (False, 1), (False, 7), (False, 1000), (True, 7)])
def test_trading_time_for_memory_changes_no_gradient(recompute, tile):
    model, x, labels = decoder(hybrid()), tokens(30, batch=2), tokens(30, batch=2, seed=1)
    want, want_grads = loss_and_gradients(model, x, labels)
    for block in model.blocks:
        block.recompute, block.ffn.tile = recompute, tile
    total, grads = loss_and_gradients(model, x, labels)
    torch.testing.assert_close(total, want, rtol=1e-13, atol=0)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad, rtol=1e-11, atol=1e-13)


def kept_bytes(model, x, labels):
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, *_ = model(x, Layout((0, x.shape[1])), labels)
    total.backward()
    return sum(kept.values())


def test_recomputing_and_tiles_keep_less_for_the_backward_pass():
    model, x, labels = decoder(hybrid()), tokens(200), tokens(200, seed=1)
    everything = kept_bytes(model, x, labels)
    for block in model.blocks:
        block.ffn.tile = 100
    # Of 3 layers: gates, values and their product, of hidden width 10, in float64, for the number of rows in int32.
    assert everything - kept_bytes(model, x, labels) >= 3 * (200 * 3 * 10 * 8 - 4)
    for block in model.blocks:
        block.recompute = True
    # The stream before each of 3 blocks and after, its last norm's scale, what the loss keeps, and the weights.
    weights = 2 * sum(p.numel() for p in model.parameters())
    assert kept_bytes(model, x, labels) <= 8 * (weights + 200 * 12 * (3 + 3))


@pytest.mark.parametrize("block", ["sequential", "parallel", "postnorm"])
def test_a_recomputed_block_computes_a_tiled_feed_forward_twice_in_all(block):
    """Forward, and tile by tile in the backward pass: not once more where the block is recomputed."""
    x, labels, flops = tokens(30), tokens(30, seed=1), {}
    for recompute in (False, True):
        model = decoder(hybrid(block=block))
        for part in model.blocks:
            part.recompute, part.ffn.tile = recompute, 7
        with FlopCounterMode(display=False) as counter:
            model(x, Layout(BOUNDS), labels).total.backward()
        flops[recompute] = counter.get_total_flops()
    again = 30 * sum(part.ffn.flops_per_token for part in model.blocks)
    mixers = sum(part.mixer.flops(Layout(BOUNDS)) for part in model.blocks)
    assert 0 < flops[True] - flops[False] < mixers + again
    assert all(part.ffn.output_read for part in model.blocks)


def test_without_gradients_nothing_is_recomputed():
    model, x = decoder(hybrid()), tokens(30)
    for block in model.blocks:
        block.recompute = True
    with torch.no_grad():
        assert not model(x, Layout(BOUNDS)).requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_every_product_that_is_needed(tied, monkeypatch):
    """Torch counts what runs outside of the mixers' cores; the cores run more than they need, in chunks and masks."""
    model = decoder(hybrid(depth=4, tie_embeddings=tied))
    x, layout = tokens(30), Layout(BOUNDS)
    monkeypatch.setattr(
        lightning, "begin_cached_scan", lambda recurrence, k, v, *args: SimpleNamespace(finish=lambda q: v)
    )
    monkeypatch.setattr(softmax, "softmax_attention", lambda q, k, v, layout, scale, mask: q)
    with FlopCounterMode(display=False) as counter:
        model(x, layout)
    states = 2 * 30 * 3 * 2 * (2 * 4 * 4)
    pairs = 2 * int(causal_document_mask(BOUNDS).sum()) * 6 * 2 * (2 * 4)
    assert model.flops(layout) == counter.get_total_flops() + states + pairs


# The parallel block


def parallel(**changes):
    return hybrid(block="parallel", **changes)


def test_in_the_parallel_block_mixer_and_feed_forward_read_one_normed_stream():
    model, layout = decoder(parallel()), Layout(BOUNDS)
    assert not any("ffn_norm" in name for name, _ in model.named_parameters())
    x = model.embedding(tokens(30, batch=2)).detach()
    for block in model.blocks:
        with torch.no_grad():
            block.mixer_norm.weight.copy_(torch.linspace(0.5, 2, 12))
        normed = x * (x.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * block.mixer_norm.weight
        want = x + block.mixer(normed, layout) + block.ffn(normed, layout)
        x, said = block(x, layout)
        torch.testing.assert_close(x, want, rtol=1e-11, atol=1e-12)
        assert said == {}


@pytest.mark.parametrize("config", [parallel(), with_experts(block="parallel")], ids=["dense", "experts"])
def test_recomputing_a_parallel_block_changes_no_gradient_and_reports_the_same(config):
    x, labels, answers = tokens(30, batch=2), tokens(30, batch=2, seed=1), []
    for recompute in (False, True):
        model = decoder(config)
        for block in model.blocks:
            block.recompute, block.ffn.tile = recompute, 7
        losses = model(x, Layout(BOUNDS), labels)
        (losses.total + sum(report.loss for report in losses.reports.values())).backward()
        answers.append(([p.grad for p in model.parameters()], losses.reports))
    (grads, reports), (again, reports_again) = answers
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    assert all(grad.norm() > 0 for grad in grads)
    assert reports.keys() == reports_again.keys()
    assert all(torch.equal(reports[name].counts, reports_again[name].counts) for name in reports)


def test_a_recomputed_parallel_block_keeps_its_input_alone():
    model, x, labels = decoder(parallel()), tokens(200), tokens(200, seed=1)
    everything = kept_bytes(model, x, labels)
    for block in model.blocks:
        block.recompute = True
    weights = 2 * sum(p.numel() for p in model.parameters())
    # As in the sequential block: the stream before each of 3 blocks and after, its last norm's scale, the loss.
    assert kept_bytes(model, x, labels) <= 8 * (weights + 200 * 12 * (3 + 3)) < everything


# Generation


@pytest.mark.parametrize(("tied", "arrangement"), [(True, "sequential"), (False, "sequential"), (True, "parallel")])
@pytest.mark.parametrize("pieces", [(1,) * 20, (7, 1, 1, 5, 1, 5), (19, 1), (20,)], ids=str)
def test_logits_of_a_document_in_pieces_are_those_of_the_whole(tied, arrangement, pieces):
    model, x = decoder(hybrid(depth=4, tie_embeddings=tied, block=arrangement)), tokens(20, batch=2)
    for block in model.blocks:
        block.recompute, block.ffn.tile = True, 7
    whole, cache, seen = model(x, Layout((0, 20))), model.new_cache(), 0
    for part in x.split(pieces, dim=1):
        seen += part.shape[1]
        logits = model.next_logits(part, cache)
        torch.testing.assert_close(logits, whole[:, seen - 1], rtol=1e-11, atol=1e-12)
        assert not logits.requires_grad


class _Rows(TorchDispatchMode):
    """The most rows of a result that has a column for each token of the vocabulary."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 0 and out.shape[-1] == VOCABULARY:
            self.most = max(self.most, out.numel() // VOCABULARY)
        return out


def test_of_a_prompt_only_the_last_token_has_logits():
    model, x = decoder(hybrid()), tokens(200, batch=2)
    with _Rows() as rows:
        model.next_logits(x, model.new_cache())
    assert rows.most <= 12  # the head's own matrix, turned
    with _Rows() as rows:
        model(x, Layout((0, 200)))
    assert rows.most == 2 * 200


def test_a_cache_of_another_model_or_batch_is_refused():
    model, x = decoder(hybrid()), tokens(5, batch=2)
    with pytest.raises(ValueError, match="cache has 2 layers, and the decoder has 3"):
        model.next_logits(x, decoder(hybrid(depth=2)).new_cache())
    with pytest.raises(ValueError, match=r"tokens has shape \[2, 0\]: expected \[batch, tokens\], at least one"):
        model.next_logits(x[:, :0], model.new_cache())
    cache = model.new_cache()
    model.next_logits(x, cache)
    with pytest.raises(ValueError, match=r"\[3, 3, 4, 4\]"):
        model.next_logits(tokens(5, batch=3), cache)


# Other forms of the stream


def other_forms():
    """A stream that norms replace, factors, norms with 1 plus their weight, and layers that are mixers alone."""
    residual = {"lightning": (1.5, 0.5), "swiglu": (0.7, 2.0)}
    return {
        "postnorm": hybrid(block="postnorm", residual=residual),
        "factors": hybrid(residual=residual),
        "zero-centered norms": hybrid(norm="zero_centered_rms", ffn=("none", "swiglu")),
        "mixers alone": hybrid(ffn="none", swiglu=None),
    }


def written_out(model, x, layout, config):
    """Block by block, from the configuration."""

    def normed(x, norm):
        weight = norm.weight + (1 if config.norm == "zero_centered_rms" else 0)
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight

    x = model.embedding(x)
    for number, block in enumerate(model.blocks):
        names = config.mixer(number).name, config.feed_forwards[number]
        for name, norm, layer in zip(names, (block.mixer_norm, block.ffn_norm), (block.mixer, block.ffn), strict=True):
            if name == "none":
                assert norm is layer is None
                continue
            y = normed(x, norm)
            a, b = (config.residual or {}).get(name, (1, 1))
            x = a * (y if config.block == "postnorm" else x) + b * layer(y, layout)
    return F.linear(normed(x, model.norm), model.head_weight)


def distinct(model):
    """No norm's weight is what it began as."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("name", other_forms())
def test_other_forms_of_the_stream_are_as_written_out(name):
    config, layout, x = other_forms()[name], Layout(BOUNDS), tokens(30, batch=2)
    model = distinct(decoder(config))
    torch.testing.assert_close(model(x, layout), written_out(model, x, layout, config), rtol=1e-11, atol=1e-12)
    cache = model.new_cache()
    *_, last = [model.next_logits(part, cache) for part in tokens(17).split([5, 1, 11], dim=1)]
    torch.testing.assert_close(last, model(tokens(17), Layout((0, 17)))[:, -1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", other_forms())
def test_other_forms_of_the_stream_are_recomputed_and_shrunk(name):
    config = other_forms()[name]
    kept, again = recomputed(config, Layout(BOUNDS))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(grad.norm() > 0 for grad in kept)
    small = config.shrunk()
    assert type(config)(**{key: getattr(small, key) for key in type(config).model_fields}) == small
    assert (small.block, small.residual, small.norm) == (config.block, config.residual, config.norm)
    assert decoder(config).flops(Layout(BOUNDS)) > 0


WHOLE = (0, 1, 17, 32)
"""Divides over two ranks: padding would have labels."""


def form_on_rank(name):
    layout = layout_here(WHOLE, "zigzag")
    model = distinct(decoder(other_forms()[name]))
    total, *_ = model(layout.shard(tokens(32)), layout, layout.shard(tokens(32, seed=1)))
    total.backward()
    return total.detach(), {key: parameter.grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", other_forms())
def test_ranks_change_nothing_of_other_forms_of_the_stream(ranks, name):
    model = distinct(decoder(other_forms()[name]))
    total, *_ = model(tokens(32), Layout(WHOLE), tokens(32, seed=1))
    total.backward()
    losses, grads = zip(*ranks.run(form_on_rank, name, size=2), strict=True)
    torch.testing.assert_close(sum(losses), total.detach(), rtol=1e-11, atol=0)
    for key, parameter in model.named_parameters():
        assert (sum(grad[key] for grad in grads) - parameter.grad).norm() <= 1e-10 * parameter.grad.norm(), key
