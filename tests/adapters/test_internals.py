"""Internals of the frameworks are as the adapters use them; tests/packaging/test_internals.py has those of torch."""

import pytest

from tests.adapters.internals import FRAMEWORKS
from tests.packaging.internals import files_of, find_uses, read_sources

USES = find_uses(read_sources())


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_internal_is_as_it_is_used(name: str) -> None:
    framework = name.partition(".")[0]
    pytest.importorskip("megatron.core" if framework == "megatron" else framework)
    FRAMEWORKS[name].run(name, files_of(name, USES))
