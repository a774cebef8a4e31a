"""Documents of a corpus with a length in a range, numbered from 0."""

import numpy as np

from longctx.data.corpus import Corpus, Index
from longctx.data.length_range import LengthRange
from longctx.data.tokenizer import Tokens


class Documents:
    """The documents of a corpus whose length is in a range, in the corpus's order. Thread-safe.

    lengths: int64 [documents], tokens per document, including its end token.
    row_groups: int64 [groups + 1], the first document of each row group that has any, then the number of documents.
    stored_tokens: int64 [groups], tokens of each of these row groups, of its documents outside the range too: what
        decoding one takes.
    """

    def __init__(self, corpus: Corpus, lengths: LengthRange) -> None:
        """Select the documents of `corpus` with a length in `lengths`; there may be none."""
        self.corpus = corpus
        self.range = lengths
        self.lengths, self.row_groups = corpus.lengths, corpus.row_groups
        self.stored_tokens: Index = np.add.reduceat(corpus.lengths, corpus.row_groups[:-1])
        self._numbers: Index | None = None
        if not lengths.has_all:
            self._numbers = np.flatnonzero(lengths.contains(corpus.lengths))
            self.lengths = corpus.lengths[self._numbers]
            firsts = np.searchsorted(self._numbers, corpus.row_groups)
            has_any = np.diff(firsts) > 0
            self.row_groups = np.concatenate([[0], firsts[1:][has_any]])
            self.stored_tokens = self.stored_tokens[has_any]
        self.tokens = int(self.lengths.sum())
        """Tokens of the documents, including end tokens."""

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the tokenizer, the documents and their order."""
        return self.range.fingerprint(self.corpus.fingerprint)

    def read(self, document: int, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop) of a document; as `Corpus.read`."""
        return self.corpus.read(document if self._numbers is None else int(self._numbers[document]), start, stop)
