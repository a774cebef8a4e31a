"""Weights go between the built-in model and Megatron's: its checkpoints are read, and it reads what is written."""

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")

from longctx.checkpoint.weights import find_weights
from longctx.convert.megatron import find_checkpoint, from_megatron, to_megatron
from longctx.convert.megatron_script import SPEC, script_spec
from longctx.mixers.gla import GlaConfig
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder
from longctx.model.ffn import SwigluConfig
from longctx.parallel.layout import Layout
from tests.adapters.megatron.cases import LENGTH, VOCABULARY, Run, gpt, losses, parallel, rows_of, tokens
from tests.adapters.megatron.shim import on_cpu
from tests.adapters.megatron.training import may_start_processes
from tests.convert.cases import HOW, save, values

HEADS = HeadMixtureConfig(mixers=("softmax", "lightning"), shared=4, active=2)
OPTIONS = SoftmaxConfig(heads=8, kv_heads=4, head_dim=4, rope_theta=300.0, window=9, qk_norm="rms", output_gate=True)
CASES = {
    "LSG": {},
    "S": {},
    "L": {},
    "LSG, a mixture of heads": {"heads": HEADS},
    "S, a mixture of heads with options": {
        "heads": HEADS.model_copy(update={"mixers": ("softmax",)}),
        "softmax": OPTIONS,
    },
    "LB, with other options than Megatron's arguments say": {
        "lightning": LightningConfig(heads=4, head_dim=6, form="minimax"),
        "linear": LinearConfig(heads=4, head_dim=2, feature_map="hedgehog"),
    },
}


def model(case):
    """A model whose first letters are a case's."""
    layers, changes = case.partition(",")[0], CASES[case]
    tables = {
        "softmax": SoftmaxConfig(heads=8, kv_heads=4, head_dim=4) if "S" in layers else None,
        "lightning": LightningConfig(heads=8, head_dim=4) if "L" in layers else None,
        "gla": GlaConfig(heads=8, head_dim=4) if "G" in layers else None,
    }
    fields = {"layers": layers, "depth": 4, "dim": 32, "swiglu": SwigluConfig(hidden=24), "tie_embeddings": False}
    return ModelConfig(**fields | tables | changes, norm_eps=1e-5, vocab_size=VOCABULARY)


GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "bias_activation_fusion": False}


def in_megatron(run, config, folder, saved=None):
    """On a rank: the losses of its tokens by a model of Megatron's with the weights in `folder`, which it saves."""
    from megatron.core import dist_checkpointing, parallel_state

    said: dict[str, object] = {}
    exec(script_spec(config), said)
    with on_cpu():
        parallel(run)
        megatron = gpt(run, said[SPEC], **GATED)
        if folder is not None:
            loaded = dist_checkpointing.load({"model": megatron.sharded_state_dict()}, str(folder))
            megatron.load_state_dict(loaded["model"])
        if saved is not None:
            may_start_processes()
            if torch.distributed.get_rank() == 0:
                saved.mkdir(parents=True)
            torch.distributed.barrier()
            dist_checkpointing.save(megatron.sharded_state_dict(), str(saved))
        found = losses(run, megatron).detach()
        rank = parallel_state.get_context_parallel_rank()
        parallel_state.destroy_model_parallel()
        return rank, found


def built_in(config, path):
    """The losses of all tokens by the built-in model."""
    decoder = Decoder(config, VOCABULARY)
    decoder.load_state_dict(values(find_weights(path, HOW)))
    x, labels = tokens(1)
    logits = decoder.double()(x, Layout((0, LENGTH)))
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").detach()


def gathered(run, answers):
    found = torch.zeros(1, LENGTH, dtype=torch.float64)
    for rank, part in answers:
        found[:, rows_of(run, rank)] = part
    return found


@pytest.mark.parametrize("case", CASES)
def test_megatron_computes_with_what_is_written_what_the_built_in_model_does(ranks, tmp_path, case):
    config, run = model(case), Run(tp=2, cp=2)
    save(tmp_path / "weights", 5, config)
    to_megatron(tmp_path / "weights", tmp_path / "megatron")
    answers = ranks.run(in_megatron, run, config, find_checkpoint(tmp_path / "megatron"), size=4)
    # Megatron makes its rotary angles in float32.
    torch.testing.assert_close(gathered(run, answers), built_in(config, tmp_path / "weights"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_built_in_model_computes_with_what_megatron_wrote_what_that_does(ranks, tmp_path, case):
    config, run = model(case), Run(tp=2, cp=2)
    answers = ranks.run(in_megatron, run, config, None, tmp_path / "megatron", size=4)
    from_megatron(tmp_path / "megatron", config, tmp_path / "weights")
    torch.testing.assert_close(built_in(config, tmp_path / "weights"), gathered(run, answers), rtol=1e-5, atol=0)
