"""Profile reference: the page of every key of a cluster profile, from the classes."""

import inspect

from longctx.launch.cluster.profile import PROFILES, Profile
from longctx.recipe.reference import key_rows

_HEAD = """\
# Cluster profiles

A profile is a table of `clusters.toml`, which `longctx launch RECIPE --profile NAME` looks for in the working
directory, its parents, and `~/.config/longctx/`; `--profiles FILE` names another file. `extends = "other"` starts from
another profile of the file. `cluster.KEY=VALUE` on the command line overrides a key. [cluster.md](cluster.md) has
examples.

Durations are written `"90s"`, `"10m"`, `"24h"`.

This page is generated from the code by `make docs`.
"""


def profile_reference() -> str:
    """Return the page as Markdown."""
    common = Profile.model_fields
    lines = [_HEAD, "## Every profile", "", *key_rows(common), ""]
    for executor, kind in PROFILES.items():
        own = {key: field for key, field in kind.model_fields.items() if key not in {*common, "executor"}}
        lines += [f'## `executor = "{executor}"`', "", " ".join((inspect.getdoc(kind) or "").split()), ""]
        lines += [*key_rows(own), ""] if own else []
    return "\n".join(lines).rstrip() + "\n"
