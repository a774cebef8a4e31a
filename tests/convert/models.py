"""Models that transformers has a class for, by name, their files, and files that are refused."""

import json

import pytest

from longctx.convert.huggingface import from_huggingface, to_huggingface
from longctx.errors import UserError
from longctx.mixers.deltanet import GatedDeltaNetConfig
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.mamba2 import Mamba2Config
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from longctx.model.moe import MoeConfig
from tests.convert.cases import save

SOFTMAX = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4)


def like_llama(**changes):
    fields = {"layers": "S", "depth": 2, "dim": 12, "softmax": SOFTMAX, "swiglu": SwigluConfig(hidden=10)}
    return ModelConfig(**(fields | changes))


def like_mixtral(**changes):
    moe = MoeConfig(**({"experts": 3, "active": 2, "hidden": 10, "balance": 0.3} | changes))
    return like_llama(ffn="moe", swiglu=None, moe=moe)


def like_mamba2(**changes):
    mamba2 = Mamba2Config(**({"heads": 4, "head_dim": 6, "state_dim": 5, "groups": 2} | changes))
    return ModelConfig(layers="M", depth=2, dim=12, ffn="none", mamba2=mamba2)


def like_qwen3_next(**changes):
    softmax = {"rotary_dim": 2, "qk_norm": "zero_centered_rms", "output_gate": True}
    shared = {"shared": 1, "shared_hidden": 7, "shared_gate": True}
    fields = {
        "layers": "EES",
        "depth": 4,
        "dim": 12,
        "norm": "zero_centered_rms",
        "ffn": ("moe", "swiglu"),
        "softmax": SOFTMAX.model_copy(update=softmax),
        "gated_deltanet": GatedDeltaNetConfig(heads=4, qk_heads=2, head_dim=5),
        "moe": MoeConfig(experts=3, active=2, hidden=10, normalize=False, **shared),
        "swiglu": SwigluConfig(hidden=10),
    }
    return ModelConfig(**(fields | changes))


def like_minimax(**changes):
    fields = {
        "layers": "LS",
        "depth": 3,
        "dim": 12,
        "block": "postnorm",
        "residual": {"softmax": (2.0, 1.0), "moe": (1.0, 0.5)},
        "ffn": "moe",
        "softmax": SoftmaxConfig(heads=3, head_dim=4, window=5),
        "lightning": LightningConfig(heads=3, head_dim=4, form="minimax", norm_eps=1e-6),
        "moe": MoeConfig(experts=3, active=2, hidden=10),
    }
    return ModelConfig(**(fields | changes))


MODELS = {
    "llama": like_llama(),
    "llama, untied": like_llama(tie_embeddings=False),
    "mixtral": like_mixtral(),
    "mamba2": like_mamba2(),
    "qwen3_next": like_qwen3_next(),
    "minimax": like_minimax(),
    "minimax, lightning alone": like_minimax(layers="L", depth=2, softmax=None, residual={"moe": (1.0, 1.0)}),
}


def exported(place, config, **options):
    """The folder that a model of chance becomes."""
    save(place / "built-in", 0, config)
    to_huggingface(place / "built-in", place / "theirs", **options)
    return place / "theirs"


def change(folder, **keys):
    """Give keys of its configuration other values, or take them out."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (content | keys).items() if v != "gone"}))


def numbered(folder, number):
    """A file of its several."""
    (file,) = folder.glob(f"model-{number:05d}-of-*.safetensors")
    return file


def refused(folder):
    """The message with which the import of `folder` is refused; nothing is written."""
    out = folder.parent / "out"
    with pytest.raises(UserError) as caught:
        from_huggingface(folder, out)
    assert not list(out.parent.glob("out*"))
    return str(caught.value)
