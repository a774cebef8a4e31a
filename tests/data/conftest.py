"""Fixtures of the tests of data: a Hub that this process serves."""

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from tests.data.fake_hub import FakeHub, serve


@pytest.fixture
def hub(tmp_path_factory, monkeypatch) -> Iterator[FakeHub]:
    """The Hub that huggingface_hub asks, and an empty cache of it; nobody is logged in."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def offline(monkeypatch) -> None:
    """What HF_HUB_OFFLINE=1 sets as huggingface_hub is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
