"""Initial weights: of the seed and the names alone, the same ones sharded and whole."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from longctx.mixers.lightning import log_decays
from longctx.model.decoder import Decoder
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from tests.model.cases import VOCABULARY, decoder, hybrid


def sharded():
    mesh = init_device_mesh("cpu", (2,))
    with torch.device("meta"):
        model = Decoder(hybrid(tie_embeddings=False), VOCABULARY).double()
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    initialise(model, seed=7)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}, model.blocks[0].mixer.log_decay


def test_two_ranks_draw_what_one_draws(ranks):
    # The embedding's 29 rows do not divide.
    whole = dict(decoder(hybrid(tie_embeddings=False)).named_parameters())
    for parameters, decays in ranks.run(sharded, size=2):
        assert parameters.keys() == whole.keys()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, whole[name]), name
        assert decays.tolist() == pytest.approx(log_decays(3, 0, 3))


def test_the_dtype_changes_rounding_alone():
    wide, narrow = decoder(hybrid()), decoder(hybrid(), torch.bfloat16)
    for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_the_seed_and_the_name_decide():
    first, again, other = (Decoder(hybrid(), VOCABULARY) for _ in range(3))
    initialise(first, seed=1)
    torch.manual_seed(99)
    initialise(again, seed=1)
    initialise(other, seed=2)
    values = [dict(model.named_parameters()) for model in (first, again, other)]
    matrices = [name for name, p in values[0].items() if p.ndim == 2]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert all(not torch.equal(values[0][name], values[2][name]) for name in matrices)
    same_shape = values[0]["blocks.0.ffn.down.weight"], values[0]["blocks.1.ffn.down.weight"]
    assert not torch.equal(*same_shape)


def test_standard_deviations_are_by_fan_in_and_by_depth_into_the_stream():
    config = hybrid(dim=96, depth=2, softmax=hybrid().softmax.model_copy(update={"head_dim": 20}), tie_embeddings=False)
    model = Decoder(config, 300)
    initialise(model, seed=0)
    residual = (2 * 2) ** -0.5
    want = {
        "embedding.weight": 96**-0.5,
        "head.weight": 96**-0.5,
        "blocks.0.mixer.qkvu.weight": 96**-0.5,
        "blocks.0.mixer.out.weight": residual * 96**-0.5,
        "blocks.1.mixer.qkv.weight": 96**-0.5,
        "blocks.1.mixer.out.weight": residual * 120**-0.5,
        "blocks.0.ffn.gate_up.weight": 96**-0.5,
        "blocks.0.ffn.down.weight": residual * 10**-0.5,
    }
    for name, std in want.items():
        assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.1), name
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert abs(parameter.mean()) < 5 * parameter.std() / parameter.numel() ** 0.5, name


def test_logits_of_a_fresh_model_are_of_unit_scale():
    logits = decoder(hybrid(dim=96))(torch.arange(VOCABULARY)[None], Layout((0, VOCABULARY)))
    assert 0.5 < logits.std() < 2
