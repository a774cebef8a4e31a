"""A model's files, for all tests of what they are made of and into."""

import shutil

import pytest

from tests.convert.models import exported, like_llama


@pytest.fixture(scope="module")
def exported_llama(tmp_path_factory):
    """A llama in several files."""
    return exported(tmp_path_factory.mktemp("whole"), like_llama(tie_embeddings=False), shard_size=3000)


@pytest.fixture
def theirs(exported_llama, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(exported_llama, tmp_path / "theirs")
