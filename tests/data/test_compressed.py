"""Compressed files: what they unpack to, at bounded memory, and what is said of damaged ones."""

import bz2
import gzip
import io
import lzma
import tracemalloc

import pyarrow as pa
import pytest

from longctx.data.compressed import DamagedError, InputStream, split_suffixes

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),  # whose dictionary has 256 KiB
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
TEXT = b"".join(b"line %d\n" % number for number in range(150_000))


@pytest.mark.parametrize(
    ("name", "suffixes"),
    [
        ("a.jsonl.gz", (".jsonl", ".gz")),
        ("b/A.TXT.ZST", (".txt", ".zst")),
        ("notes.xz", ("", ".xz")),
        ("a.gz.txt", (".txt", "")),
        ("a", ("", "")),
    ],
)
def test_the_last_suffix_is_that_of_the_compression(name, suffixes):
    assert split_suffixes(name) == suffixes


@pytest.mark.parametrize("suffix", PACK)
def test_files_unpack_and_so_do_several_in_one(suffix):
    packed = PACK[suffix](TEXT)
    for count in (1, 2):
        assert InputStream(io.BytesIO(packed * count), suffix).stream.read() == TEXT * count


@pytest.mark.parametrize("suffix", PACK)
def test_a_truncated_file_gives_what_is_before_the_end_and_then_an_error(suffix):
    stream = InputStream(io.BytesIO(PACK[suffix](TEXT)[:-12]), suffix).stream
    lines = []
    with pytest.raises(DamagedError, match=r"cannot be unpacked after byte \d+ of its content: .*(ended|Truncated)"):
        lines.extend(iter(stream.readline, b""))
    assert lines
    assert TEXT.startswith(b"".join(lines))


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_of_another_format_is_damaged_from_the_start(suffix):
    with pytest.raises(DamagedError, match="after byte 0 "):
        InputStream(io.BytesIO(b"not compressed at all"), suffix).stream.read(1)


def test_a_checksum_that_differs_is_an_error():
    packed = bytearray(gzip.compress(TEXT))
    packed[-6] ^= 1
    with pytest.raises(DamagedError, match="CRC check failed"):
        InputStream(io.BytesIO(packed), ".gz").stream.read()


def test_an_error_of_the_disk_stays_one():
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        InputStream(Broken(), ".gz").stream.read(1)


@pytest.mark.parametrize("suffix", PACK)
def test_memory_does_not_grow_with_what_a_file_unpacks_to(suffix):
    """pyarrow's buffers are counted by its own pool."""
    packed = PACK[suffix](bytes(2**24))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    stream = InputStream(io.BytesIO(packed), suffix).stream
    total = held = 0
    while data := stream.read(2**16):
        total += len(data)
        held = max(held, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 2**24
    assert peak + held < 2**22


@pytest.mark.parametrize("suffix", PACK)
def test_progress_counts_bytes_of_the_file(suffix):
    packed = PACK[suffix](TEXT)
    source = InputStream(io.BytesIO(packed), suffix)
    covered = 0.0
    while data := source.stream.read(10_000):
        covered += source.covered(len(data))
    assert covered == len(packed)
    assert InputStream(io.BytesIO(TEXT)).covered(7) == 7
