"""The benchmark of saves measures every save, and leaves nothing."""

import sys
from unittest.mock import patch

from benchmarks import saves


def test_every_save_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with patch.object(sys, "argv", ["saves", "--megabytes", "1", "--saves", "3"]):
        saves.main()
    said = capsys.readouterr().out
    assert said.count(", ") == 2
    assert said.startswith("copy 0.0")
    assert list(tmp_path.iterdir()) == []
