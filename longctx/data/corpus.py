"""Prepared corpus reader: any token range of any document, at bounded memory.

Opening a corpus reads only the Parquet metadata and the `length` column. Tokens are decoded one row group at a time and
the most recently used row groups are cached, so that neighbouring documents cost one read.
"""

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from longctx.data.footer import footer_digest
from longctx.data.manifest import Manifest, ShardEntry, SplitName
from longctx.data.shards import schema
from longctx.data.tokenizer import Tokens, token_dtype
from longctx.errors import UserError

Index = npt.NDArray[np.int64]
_UNREADABLE = (OSError, ValueError, pa.ArrowException)
"""What reading a damaged shard raises."""


class Corpus:
    """The documents of one split, numbered from 0 in the order of preparation. Thread-safe.

    manifest: the corpus manifest.
    lengths: int64 [documents], tokens per document, including its end token.
    row_groups: int64 [groups + 1], the first document of each row group, then the number of documents.
    """

    def __init__(self, directory: Path | str, split: SplitName = "train", *, cache_tokens: int = 2**25) -> None:
        """Open `split` of a directory written by `longctx data prepare`.

        cache_tokens: decoded tokens to cache (2 or 4 bytes each). The row group in use is always cached; a document
        longer than `longctx.data.shards.ROW_GROUP_TOKENS` is one row group.

        Raises UserError if the directory is incomplete, a shard is damaged, or the split is empty.
        """
        self.directory = Path(directory)
        self.split: SplitName = split
        self.manifest = Manifest.load(self.directory)
        entry = self.manifest.splits.get(split)
        if entry is None or entry.documents == 0:
            others = {name: other.documents for name, other in self.manifest.splits.items() if name != split}
            raise UserError(
                f"{self.directory}: the split {split!r} has no documents (documents in the other splits: {others}); "
                f"prepare more documents, or hold out a larger fraction with --heldout"
            )
        self._shards = entry.shards
        lengths: list[Index] = []
        rows: list[int] = []
        locations: list[tuple[int, int]] = []
        for number, shard in enumerate(self._shards):
            for group, group_lengths in enumerate(self._read_lengths(shard)):
                lengths.append(group_lengths)
                rows.append(len(group_lengths))
                locations.append((number, group))
        self.lengths: Index = np.concatenate(lengths)
        self.row_groups: Index = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._locations = locations
        self._cache: OrderedDict[int, tuple[Tokens, Index]] = OrderedDict()
        self._cache_tokens = cache_tokens
        self._cached = 0
        self._lock = threading.Lock()

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens, including end tokens."""
        return int(self.lengths.sum())

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return self.manifest.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the tokenizer, the documents and their order."""
        return self.manifest.fingerprint(self.split)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> Tokens:
        """Return tokens [start, stop) of a document, read-only, uint16 or uint32 [stop - start]; None: to its end.

        Raises UserError, naming the shard, if it cannot be read or its content is damaged.
        """
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start} to {stop} of document {document}, which has {length} tokens")
        group = int(np.searchsorted(self.row_groups, document, side="right")) - 1
        values, offsets = self._group(group)
        first = int(offsets[document - int(self.row_groups[group])])
        return values[first + start : first + stop]

    def source(self, document: int) -> str:
        """Return the name of the file, line or row that a document was prepared from."""
        group = int(np.searchsorted(self.row_groups, document, side="right")) - 1
        return str(self._read_group(group, "source")[document - int(self.row_groups[group])].as_py())

    def _group(self, group: int) -> tuple[Tokens, Index]:
        """Return a row group's tokens and the offset of each of its documents, decoded or from the cache."""
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        # Decoding takes milliseconds, so it runs outside the lock; at worst two threads decode the same row group.
        decoded = self._decode(group)
        with self._lock:
            if group not in self._cache:
                self._cache[group] = decoded
                self._cached += len(decoded[0])
            while self._cached > self._cache_tokens and len(self._cache) > 1:
                _, (values, _) = self._cache.popitem(last=False)
                self._cached -= len(values)
        return decoded

    def _decode(self, group: int) -> tuple[Tokens, Index]:
        column = self._read_group(group, "tokens")
        offsets: Index = column.offsets.to_numpy().astype(np.int64)
        expected = self.lengths[self.row_groups[group] : self.row_groups[group + 1]]
        if not np.array_equal(np.diff(offsets), expected):
            raise self._damaged(self._shards[self._locations[group][0]], f"row group {group}: lengths differ")
        return column.values.to_numpy(), offsets

    def _read_group(self, group: int, column: str) -> pa.Array:
        number, inside = self._locations[group]
        shard = self._shards[number]
        try:
            with self._open(shard) as parquet:
                table = parquet.read_row_group(inside, columns=[column], use_threads=False)
        except _UNREADABLE as error:
            raise self._damaged(shard, f"row group {inside}: {error}") from error
        rows = int(self.row_groups[group + 1] - self.row_groups[group])
        kind = schema(token_dtype(self.vocab_size)).field(column).type
        if table.column_names != [column] or len(table) != rows or table.schema[0].type != kind:
            raise self._damaged(shard, f"row group {inside}: it has no {column} of {rows} documents")
        return table.column(0).combine_chunks()

    def _read_lengths(self, shard: ShardEntry) -> list[Index]:
        try:
            footer = None if shard.footer is None else footer_digest(self.directory / shard.file)
            with self._open(shard) as parquet:
                tables = [
                    parquet.read_row_group(group, columns=["length"], use_threads=False)
                    for group in range(parquet.num_row_groups)
                ]
        except _UNREADABLE as error:
            raise self._damaged(shard, str(error)) from error
        if footer != shard.footer:
            raise self._damaged(shard, "its footer has changed since it was prepared")
        if any(table.column_names != ["length"] or not pa.types.is_integer(table.schema[0].type) for table in tables):
            raise self._damaged(shard, "it has no lengths of documents")
        groups = [table.column(0).to_numpy() for table in tables]
        rows, tokens = sum(map(len, groups)), int(sum(group.sum() for group in groups))
        if (rows, tokens) != (shard.rows, shard.tokens):
            raise self._damaged(
                shard, f"has {rows} documents and {tokens} tokens; the manifest has {shard.rows} and {shard.tokens}"
            )
        return groups

    def _open(self, shard: ShardEntry) -> pq.ParquetFile:
        # Opened for each read: parsing a footer takes well under the time of decoding a row group, and a corpus of
        # thousands of shards would run out of file descriptors.
        return pq.ParquetFile(self.directory / shard.file, page_checksum_verification=True)

    def _damaged(self, shard: ShardEntry, detail: str) -> UserError:
        return UserError(
            f"shard {self.directory / shard.file} cannot be read: {detail.strip().splitlines()[0]}; "
            f"copy it again, or prepare the corpus again"
        )
