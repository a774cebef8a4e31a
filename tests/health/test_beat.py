"""Reports of ranks in a folder: the last of each rank, whole or not at all, and whether a hang was declared."""

from dataclasses import replace
from pathlib import Path

from longctx.health.beat import Beat, FolderBoard, decode, encode

BEAT = Beat(
    number=1,
    host="node1",
    pid=11,
    phase="step 5",
    elapsed=3.0,
    limit=10.0,
    patience=6.0,
    collective="",
    waited=0.0,
    where="longctx.model.ffn:128 in forward",
)


def test_the_last_report_of_each_rank_that_reported_is_read(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    board.post(0, BEAT)
    board.post(2, BEAT)
    board.post(2, replace(BEAT, number=2))
    assert board.read(range(4)) == {0: BEAT, 2: replace(BEAT, number=2)}
    assert board.read([1, 3]) == {}


def test_a_report_that_is_none_is_left_out(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    board.post(0, BEAT)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"[1]", b"\xff"):
        file.write_bytes(damaged)
        assert board.read([0]) == {}
    assert decode(encode(BEAT)) == BEAT


def test_a_hang_is_declared_to_all(tmp_path: Path) -> None:
    one, other = FolderBoard(tmp_path), FolderBoard(tmp_path)
    assert not other.is_hang_declared()
    one.declare_hang()
    assert other.is_hang_declared()


def test_a_rank_is_overdue_beyond_its_limit() -> None:
    assert not replace(BEAT, elapsed=10.0).is_overdue
    assert replace(BEAT, elapsed=10.1).is_overdue
