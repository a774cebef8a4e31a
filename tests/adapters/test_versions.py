"""A framework that is missing, too old or too new is refused with what was tested."""

import sys
from types import SimpleNamespace

import pytest

from longctx.adapters import versions
from longctx.adapters.versions import UnsupportedVersionError

TESTED = versions.TestedVersions("megatron-core", "some_framework", oldest="0.16.1", newest="0.17", extra="megatron")


@pytest.mark.parametrize("version", ["0.16.1", "0.16.2", "0.17.0", "0.17.5", "0.17.0rc1", "0.16.1+cu13"])
def test_what_was_tested_is_taken(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "some_framework", SimpleNamespace(__version__=version))
    TESTED.check()


@pytest.mark.parametrize("version", ["0.16.0", "0.15.3", "0.18.0", "1.0"])
def test_what_is_older_or_newer_is_refused(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "some_framework", SimpleNamespace(__version__=version))
    message = f"this is megatron-core {version}, and longctx was tested with megatron-core 0.16.1 to 0.17: "
    with pytest.raises(UnsupportedVersionError, match=message.replace(".", r"\.")) as caught:
        TESTED.check()
    assert "pip install -e '.[megatron]'" in str(caught.value)


def test_what_is_missing_is_named():
    message = r"no-such-package is not installed: pip install -e '\.\[none\]'"
    with pytest.raises(UnsupportedVersionError, match=message):
        versions.TestedVersions("no-such-package", "no_such_module", oldest="1", newest="1", extra="none").check()
