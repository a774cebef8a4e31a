"""Object stores: what a URL names, and files that are read as streams."""

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from longctx.data.stores import find, folder_above, is_pattern
from longctx.errors import UserError
from tests.data.cases import write_parquet


@pytest.fixture
def files():
    """A store in memory, `memory://bucket`."""
    store = MemoryFileSystem()
    yield store
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)


def test_patterns_have_wildcards():
    assert is_pattern("a/*.txt")
    assert not is_pattern("a/b.txt")
    assert [folder_above(pattern) for pattern in ("a/b/c?.txt", "a/[bc]/*", "*", "a/**/b")] == ["a/b", "a", "", "a"]


def test_a_url_is_a_file_a_folder_or_a_pattern(files):
    files.pipe({"/bucket/a/b.txt": b"one", "/bucket/c.txt": b"three"})
    one, all_, some = (find(f"memory://bucket/{path}") for path in ("a/b.txt", "", "*/*.txt"))
    assert (one.root, one.is_folder, one.files) == ("memory:///bucket/a", False, {"b.txt": 3})
    assert (all_.root, all_.is_folder, all_.files) == ("memory:///bucket", True, {"a/b.txt": 3, "c.txt": 5})
    assert (some.root, some.is_folder, some.files) == ("memory:///bucket", True, {"a/b.txt": 3})
    with one.open("b.txt") as stream:
        assert stream.read() == b"one"


def test_parquet_is_read_in_place(files, tmp_path):
    files.pipe({"/bucket/p.parquet": write_parquet(tmp_path / "p.parquet", ["x", "y"]).read_bytes()})
    found = find("memory://bucket/p.parquet")
    with found.open("p.parquet") as stream:
        assert pq.read_table(stream).column("text").to_pylist() == ["x", "y"]


def test_errors_of_a_store_name_the_url(files, monkeypatch):
    with pytest.raises(UserError, match=r"^input nowhere://a: .*Protocol not known: nowhere"):
        find("nowhere://a")
    files.pipe({"/bucket/a.txt": b"one", "/bucket/b.txt": b"two"})
    found = find("memory://bucket")
    files.rm("/bucket/b.txt")
    with pytest.raises(UserError, match=r"input memory:///bucket/b.txt: no such file"):
        found.open("b.txt")

    def broken(*_):
        raise ConnectionError("reset by peer")

    with found.open("a.txt") as stream:
        monkeypatch.setattr(type(files.open("/bucket/a.txt")), "read", broken)
        with pytest.raises(UserError, match=r"input memory:///bucket/a.txt: ConnectionError: reset by peer"):
            stream.read()


def test_a_store_without_its_library_is_an_error_that_names_the_extra(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://b/a: the library for this store is missing .*pip install -e '\.\[s3\]'"):
        find("s3://b/a")
