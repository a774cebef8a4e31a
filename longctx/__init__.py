"""longctx: exact sequence-parallel training of linear, softmax and hybrid models on million-token sequences."""

import importlib as _importlib
import os as _os

__version__ = "0.2.0"

_PACKAGES = (
    "adapters", "bench", "checkpoint", "convert", "data", "engines", "generate", "kernels", "layers", "mixers", "model",
    "moe", "parallel", "recipe", "train", "verify",
)  # fmt: skip
_NAMES = {
    "Layout": "parallel.layout",
    "Mesh": "parallel.mesh",
    "Recipe": "recipe",
    "UserError": "errors",
    "linear_attention": "kernels.linear",
    "parallelize": "adapters.huggingface",
    "softmax_attention": "parallel.attention",
    "state_scan": "parallel.scan",
}
"""Names that `longctx` offers itself, and the modules that define them."""

# In a source checkout the sub-packages `longctx.kernels`, `longctx.parallel`, … are beside this folder, not inside it
# (pyproject.toml maps them for wheels and editable installs). Adding the parent folder lets a plain checkout on
# PYTHONPATH import the same modules. In an installed wheel they are inside, and the path must not change: with
# site-packages on it, `longctx.torch` would import torch.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")):
    __path__.append(_os.path.dirname(_here))


def __getattr__(name: str) -> object:
    """Import a package, or a name of one, when it is first used: `import longctx` alone loads no torch."""
    if name in _PACKAGES:
        return _importlib.import_module(f"longctx.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'longctx' has no attribute {name!r}")
    value: object = getattr(_importlib.import_module(f"longctx.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_PACKAGES, *_NAMES, *(name for name in globals() if name.startswith("__"))])
