"""The lock files list everything that the adapters' frameworks need."""

import pytest

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")
pytest.importorskip("deepspeed", reason="needs the extra: pip install -e '.[deepspeed]'")
pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[huggingface]'")

from tests.packaging.test_lock import ADAPTERS, check_completeness


def test_the_files_of_the_adapters_are_complete() -> None:
    check_completeness(("dev.txt", "adapters.txt"), ADAPTERS)
