"""Upcycling: a mixture of seeds is what its parts are, and of one seed several times it is the seed."""

import pytest
import torch

from longctx.mixers.attention_experts import AttentionExpertsConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.decoder import Decoder
from longctx.model.initialise import initialise
from longctx.model.moe import MoeConfig
from longctx.moe.attention_upcycle import mean, upcycle_out, upcycle_qkv
from longctx.parallel.layout import Layout
from tests.model.cases import hybrid, tokens

DIM = 12
BOUNDS = (0, 9, 24)
HEADS = {"heads": 6, "kv_heads": 2, "head_dim": 4}
both_kinds = pytest.mark.parametrize("kv", ["each", "shared"])


def dense(seed):
    layer = SoftmaxConfig(**HEADS).build(DIM, 0, 2, 1e-5).double()
    initialise(layer, seed)
    return layer


def experts_of(layers, kv):
    """The layer of attention experts made of dense ones."""
    config = AttentionExpertsConfig(experts=len(layers), kv=kv, **HEADS)
    mixture = config.build(DIM, 0, 2, 1e-5).double()
    initialise(mixture, seed=1)
    with torch.no_grad():
        mixture.qkv.weight.copy_(upcycle_qkv([layer.qkv.weight for layer in layers], 6, 2, kv))
        mixture.out.weight.copy_(upcycle_out([layer.out.weight for layer in layers], 6, 2, kv))
    return mixture


def draw():
    return 3 * torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.no_grad()
@both_kinds
def test_attention_experts_are_the_seeds_layers_summed_by_the_routers_weights(kv):
    seeds, x, layout = [dense(seed) for seed in (2, 3, 4)], draw(), Layout(BOUNDS)
    mixture = experts_of(seeds, kv)
    weights = (x @ mixture.router.weight.T).softmax(dim=-1)
    if kv == "shared":
        # Each seed with the keys and values that all of them have on average.
        rows = 6 * 4
        averaged = sum(seed.qkv.weight[rows:] for seed in seeds) / 3
        for seed in seeds:
            seed.qkv.weight[rows:] = averaged
    want = sum(weights[..., [j]] * seed(x, layout) for j, seed in enumerate(seeds))
    torch.testing.assert_close(mixture(x, layout).out, want, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@both_kinds
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_copies_of_one_attention_are_that_attention_whatever_the_router_says(kv, count):
    seed, x, layout = dense(2), draw(), Layout(BOUNDS)
    want = seed(x, layout)
    for scale in (0.0, 1.0, 50.0):
        mixture = experts_of([seed] * count, kv)
        mixture.router.weight *= scale
        got = mixture(x, layout).out
        assert (got - want).norm() <= 1e-12 * want.norm()


PARALLEL = {"block": "parallel", "layers": "S", "depth": 2, "lightning": None}


def upcycled(seeds, config):
    """The model that `config` says, made of dense ones of the same names."""
    with torch.device("meta"):
        names = [name for name, _ in Decoder(config, 29).named_parameters()]
    model = Decoder(config, 29).double()
    initialise(model, seed=1)
    given = [dict(seed.named_parameters()) for seed in seeds]
    with torch.no_grad():
        for name in names:
            target = model.get_parameter(name)
            if name.endswith("router.weight"):
                continue
            if name.endswith("mixer.qkv.weight"):
                value = upcycle_qkv([g[name] for g in given], 6, 2, config.attention_experts.kv)
            elif name.endswith("mixer.out.weight"):
                value = upcycle_out([g[name] for g in given], 6, 2, config.attention_experts.kv)
            elif ".experts." in name:
                value = torch.stack([g[name.replace("experts.", "") + ".weight"] for g in given])
            else:
                value = mean([g[name] for g in given])
            target.copy_(value)
    return model


@both_kinds
@pytest.mark.parametrize("count", [2, 3])
def test_copies_of_a_dense_model_of_the_parallel_block_give_its_logits(kv, count):
    seed = Decoder(hybrid(**PARALLEL), 29).double()
    initialise(seed, seed=7)
    config = hybrid(
        block="parallel",
        layers="A",
        depth=2,
        lightning=None,
        softmax=None,
        attention_experts=AttentionExpertsConfig(experts=count, kv=kv, **HEADS),
        ffn="moe",
        swiglu=None,
        moe=MoeConfig(experts=count, active=1, hidden=10, normalize=True, z=1e-3),
    )
    x, layout = tokens(24, batch=2), Layout(BOUNDS)
    model = upcycled([seed] * count, config)
    with torch.no_grad():
        want, got = seed(x, layout), model(x, layout)
    assert (got - want).norm() <= 1e-10 * want.norm()
    reports = model(x, layout, x).reports
    assert (reports["blocks.0.ffn"].counts > 0).sum() == count, "several experts are taken"
    # Other seeds are another model.
    other = Decoder(hybrid(**PARALLEL), 29).double()
    initialise(other, seed=8)
    with torch.no_grad():
        assert (upcycled([seed] * (count - 1) + [other], config)(x, layout) - want).norm() > 0.1 * want.norm()


def test_the_mean_of_copies_is_the_copy_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        seed = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        for count in (1, 3, 5, 7):
            averaged = mean([seed] * count)
            assert averaged.dtype == dtype
            assert torch.equal(averaged, seed)
    ones, threes = torch.ones(2), torch.full((2,), 3.0)
    assert torch.equal(mean([ones, threes]), torch.tensor([2.0, 2.0]))


def test_seeds_keep_their_dtype():
    seeds = [dense(seed).bfloat16() for seed in (2, 3)]
    for kv in ("each", "shared"):
        assert upcycle_qkv([s.qkv.weight for s in seeds], 6, 2, kv).dtype == torch.bfloat16
        assert upcycle_out([s.out.weight for s in seeds], 6, 2, kv).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean([]), "there are no seeds"),
        (lambda: mean([torch.ones(2), torch.ones(3)]), r"the seeds' shapes differ: \[2\], \[3\]"),
        (lambda: upcycle_qkv([torch.ones(41, 5)], 6, 2, "each"), "41 rows of qkv do not match 6 query"),
        (lambda: upcycle_qkv([torch.ones(44, 5)], 3, 4, "each"), "3 query heads over 4 key/value heads"),
        (lambda: upcycle_out([torch.ones(5, 23)], 6, 2, "each"), "23 columns of out do not match 6"),
    ],
)
def test_seeds_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
