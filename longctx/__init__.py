"""longctx: exact sequence-parallel training of linear, softmax and hybrid models on million-token sequences."""

import os as _os

__version__ = "0.2.0"

# In a source checkout the sub-packages `longctx.kernels`, `longctx.parallel`, … are beside this folder, not inside it
# (pyproject.toml maps them for wheels and editable installs). Adding the parent folder lets a plain checkout on
# PYTHONPATH import the same modules. In an installed wheel they are inside, and the path must not change: with
# site-packages on it, `longctx.torch` would import torch.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")):
    __path__.append(_os.path.dirname(_here))
