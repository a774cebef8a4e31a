"""Equations of the whole model: the engine's step on one rank equals them, whatever the layers and the routers."""

from itertools import islice

import pytest

from longctx.errors import UserError
from longctx.mixers import MIXERS
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn_registry import FFNS
from longctx.model.moe import MoeConfig
from longctx.recipe.tables import TrainConfig
from longctx.verify import run
from longctx.verify.equations import decoder
from longctx.verify.equations.decoder import check_covered, uncovered
from longctx.verify.measure import Subject
from longctx.verify.run import verify
from tests.combinations import mostly_slow
from tests.mixers.cases import CONFIGS, DIM, OPTIONS
from tests.model.cases import ROUTERS, VOCABULARY, hybrid, model_of, with_experts


def layers(*names: str, **changes: object) -> ModelConfig:
    """A model of mixers in `tests.mixers.cases`, by their letters or options, one layer each."""
    tables = {MIXERS[name[0]].name: OPTIONS.get(name) or CONFIGS[name] for name in names}
    fields: dict[str, object] = {"layers": "".join(name[0] for name in names), "depth": len(names), "dim": DIM}
    return ModelConfig(**(fields | tables | {"ffn": "none"} | changes))


def heads(*mixers: str, **changes: object) -> HeadMixtureConfig:
    names = tuple(MIXERS[letter].name for letter in mixers)
    return HeadMixtureConfig(**({"mixers": names, "active": 1, "balance": 0.2} | changes))


def experts(**changes: object) -> MoeConfig:
    return MoeConfig(**({"experts": 4, "active": 2, "hidden": 6, "balance": 0.3, "z": 0.05} | changes))


MODELS = {
    "constant decays, attention experts": layers(*"BLRAL"),
    "gates": layers(*"HIMGN"),
    "the delta rule": layers(*"DHEK"),
    "options": layers(
        "L as in MiniMax",
        "M with limits and no bias",
        "E with two heads for one of keys",
        "S with norms, a gate and some channels turned",
    ),
    "a window, parallel": layers("S with norms", "L", ffn=("swiglu", "none"), block="parallel"),
    "heads": layers(*"BLRIMG", heads=heads(*"BLRIMG", shared=1)),
    "heads of the other mixers": layers(*"HNDEKS", heads=heads(*"HNDEKS")),
    "heads by norm": layers("S", heads=heads("S", shared=3, active=2, router="norm")),
    "heads with a gate": layers(
        "S with norms, a gate and some channels turned", heads=heads("S", shared=3, active=2), norm="zero_centered_rms"
    ),
    "experts and heads": model_of("token"),
    "experts by similarity": model_of("similarity"),
    "experts by attention": model_of("attention"),
    "experts with noise and a capacity": with_experts(
        moe=experts(jitter=0.3, capacity=0.7, shared=1, shared_gate=True), tie_embeddings=False
    ),
    "postnorm with factors": hybrid(
        block="postnorm", residual={"softmax": (3.5, 0.7), "swiglu": (1.5, 2.0)}, norm_eps=1e-2, vocab_size=40
    ),
}


USUAL = (
    "constant decays, attention experts",
    "gates",
    "the delta rule",
    "options",
    "experts and heads",
    "experts with noise and a capacity",
    "postnorm with factors",
)


@pytest.mark.parametrize("name", mostly_slow(MODELS, *USUAL))
def test_a_step_of_one_rank_equals_the_equations(ranks, monkeypatch, name):
    monkeypatch.setattr(run, "cases", lambda most_ranks, model: iter(()))
    rows = list(islice(verify(Subject(MODELS[name], TrainConfig(steps=1), VOCABULARY, 32, 1), ranks), 2))
    assert [str(row.case) for row in rows] == ["the equations, one document", "the equations, packed"]
    for row in rows:
        assert row.precision == "fp64"
        assert row.failures == []
        assert 0 < max(row.differences.values()) < 1e-11
        assert {"loss", "logits", "embedding.weight"} < row.differences.keys()


def test_every_mixer_feed_forward_and_router_is_in_some_model():
    assert {letter for model in MODELS.values() for letter in model.pattern} == MIXERS.keys()
    assert {name for model in MODELS.values() for name in model.feed_forwards} == {*FFNS, "none"}
    assert {model.moe.router for model in MODELS.values() if model.moe} == ROUTERS.keys()
    routed = {name for model in MODELS.values() if model.heads for name in model.heads.mixers}
    assert routed == {kind.name for letter, kind in MIXERS.items() if CONFIGS[letter].routable()}
    assert {model.block for model in MODELS.values()} == {"sequential", "parallel", "postnorm"}


def test_every_key_of_every_registered_layer_is_in_the_equations():
    for kind, known in ((MIXERS.values(), decoder.MIXERS), (FFNS.values(), decoder.FFNS)):
        assert {table.name: table.model_fields.keys() for table in kind} == {
            name: set(keys.split()) for name, (_, keys) in known.items()
        }
    tables = {table.name for table in (*MIXERS.values(), *FFNS.values())}
    assert ModelConfig.model_fields.keys() - tables == set(decoder.OTHERS[""].split())
    assert HeadMixtureConfig.model_fields.keys() == set(decoder.OTHERS["heads"].split())
    nested = OPTIONS["S with norms, a gate and some channels turned"].rope_scaling
    assert type(nested).model_fields.keys() == set(decoder.OTHERS["softmax.rope_scaling"].split())


def test_a_key_or_a_layer_without_equations_is_refused_by_its_name(monkeypatch):
    equation, keys = decoder.MIXERS["softmax"]
    monkeypatch.setitem(decoder.MIXERS, "softmax", (equation, keys.replace("window", "")))
    window = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4, window=5)
    assert uncovered(hybrid()) == [], "a default needs no equation"
    assert uncovered(hybrid(softmax=window)) == ["model.softmax.window = 5 is in no equation"]
    monkeypatch.delitem(decoder.MIXERS, "lightning")
    with pytest.raises(UserError, match=r"^model.lightning has no equations; model.softmax.window = 5 is in no equat"):
        check_covered(hybrid(softmax=window))
