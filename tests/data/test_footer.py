"""The digest of a Parquet file's footer depends on every bit of it, and on none of the pages."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longctx.data.footer import footer_digest


def test_it_is_of_the_footer_alone(tmp_path):
    file = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"tokens": list(range(1000))}), file, write_page_checksum=True)
    content, want = file.read_bytes(), footer_digest(file)
    footer = int.from_bytes(content[-8:-4], "little") + 8
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            assert (footer_digest(file) == want) == (at < len(content) - footer)
        except ValueError:
            assert at >= len(content) - 8


@pytest.mark.parametrize("content", [b"", b"PAR1", bytes(100), b"PAR1\xff\xff\xff\x7fPAR1"])
def test_what_is_no_parquet_file_is_refused(tmp_path, content):
    (tmp_path / "shard.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="not a complete Parquet file"):
        footer_digest(tmp_path / "shard.parquet")
