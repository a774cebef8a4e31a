"""Parquet shards: row groups, shard ends, and the manifest's entry."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longctx.data import shards
from longctx.data.shards import SplitWriter, schema
from longctx.errors import UserError


def document(number, length, dtype=np.uint16):
    return (number * 100 + np.arange(length)).astype(dtype)


def write(folder, lengths, dtype=np.uint16, *, shard_tokens=20, row_group_tokens=8):
    writer = SplitWriter(folder, "train", dtype, shard_tokens=shard_tokens, row_group_tokens=row_group_tokens)
    for number, length in enumerate(lengths):
        writer.add(document(number, length, dtype), f"source {number}")
    return writer.finish()


def row_groups(file):
    """Lengths of the documents of each row group."""
    with pq.ParquetFile(file) as parquet:
        return [parquet.read_row_group(group)["length"].to_pylist() for group in range(parquet.num_row_groups)]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_row_is_a_document_with_its_length_and_source(tmp_path, dtype):
    write(tmp_path, [3, 5, 2], dtype, shard_tokens=100)
    table = pq.read_table(tmp_path / "train" / "shard-00000.parquet")
    assert table.schema.equals(schema(dtype))
    assert table.schema.field("tokens").type.value_type == pa.from_numpy_dtype(dtype)
    assert table["tokens"].to_pylist() == [document(n, length).tolist() for n, length in enumerate([3, 5, 2])]
    assert table["length"].to_pylist() == [3, 5, 2]
    assert table["source"].to_pylist() == ["source 0", "source 1", "source 2"]


def test_a_row_group_ends_before_it_exceeds_its_tokens_and_a_longer_document_has_its_own(tmp_path):
    write(tmp_path, [3, 5, 4, 5, 30, 1, 2], shard_tokens=1000)
    assert row_groups(tmp_path / "train" / "shard-00000.parquet") == [[3, 5], [4], [5], [30], [1, 2]]


def test_a_shard_ends_with_the_row_group_that_reaches_its_tokens(tmp_path):
    entry = write(tmp_path, [8] * 7)
    assert [shard.file for shard in entry.shards] == [f"train/shard-0000{n}.parquet" for n in range(3)]
    assert [shard.tokens for shard in entry.shards] == [24, 24, 8]
    assert [shard.rows for shard in entry.shards] == [3, 3, 1]


def test_row_groups_are_no_larger_than_shards(tmp_path):
    entry = write(tmp_path, [4, 4, 4], shard_tokens=4, row_group_tokens=1000)
    assert [shard.tokens for shard in entry.shards] == [4, 4, 4]


def test_the_entry_has_totals_a_histogram_of_lengths_and_the_digest_of_every_shard(tmp_path):
    entry = write(tmp_path, [1, 2, 3, 4, 7, 8, 9])
    assert (entry.documents, entry.tokens) == (7, 34)
    # 1; 2 and 3; 4 to 7; 8 to 15.
    assert entry.lengths == (1, 2, 2, 2)
    assert sum(shard.rows for shard in entry.shards) == 7
    for shard in entry.shards:
        content = (tmp_path / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_split_without_documents_has_no_shard(tmp_path):
    entry = write(tmp_path, [])
    assert (entry.documents, entry.tokens, entry.lengths, entry.shards) == (0, 0, (), ())
    assert list(tmp_path.iterdir()) == []


def test_damaged_pages_are_noticed_by_their_checksum(tmp_path):
    write(tmp_path, [500], shard_tokens=1000, row_group_tokens=1000)
    file = tmp_path / "train" / "shard-00000.parquet"
    content = bytearray(file.read_bytes())
    at = pq.read_metadata(file).row_group(0).column(0).data_page_offset + 60
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(file, page_checksum_verification=True)


def test_tokens_are_split_into_byte_planes_under_zstd(tmp_path):
    write(tmp_path, [8])
    column = pq.read_metadata(tmp_path / "train" / "shard-00000.parquet").row_group(0).column(0)
    assert "BYTE_STREAM_SPLIT" in column.encodings
    assert column.compression == "ZSTD"


def test_a_document_above_the_limit_is_refused_with_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LONGEST_DOCUMENT", 10)
    writer = SplitWriter(tmp_path, "heldout", np.uint16, shard_tokens=20)
    writer.add(document(0, 10), "short")
    with pytest.raises(UserError, match="long: a document of more than 10 tokens, the limit; split the input"):
        writer.add(document(0, 11), "long")
    assert writer.finish().tokens == 10


def test_a_folder_that_cannot_be_written_is_a_user_error_with_the_path(tmp_path):
    (tmp_path / "train").write_text("a file in the place of the folder")
    writer = SplitWriter(tmp_path, "train", np.uint16, shard_tokens=4)
    with pytest.raises(UserError, match=f"^{tmp_path / 'train'}/shard-00000.parquet: cannot be written: "):
        writer.add(document(0, 4), "a")
