"""Documents in a range: numbered from 0, by the row groups that have any."""

import pytest

from longctx.data.corpus import Corpus
from longctx.data.documents import Documents
from longctx.data.length_range import LengthRange
from tests.data.cases import corpus_of, document_of

LENGTHS = [10, 3, 30, 4, 5, 2, 20, 1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Row groups of documents 0 and 1, 2, 3 to 5, 6, and 7."""
    found = Corpus(corpus_of(tmp_path_factory.mktemp("corpora") / "corpus", LENGTHS, row_group_tokens=13))
    assert found.row_groups.tolist() == [0, 2, 3, 6, 7, 8]
    return found


def test_all_documents_are_those_of_the_corpus(corpus):
    found = Documents(corpus, LengthRange())
    assert (len(found), found.tokens, found.fingerprint) == (8, sum(LENGTHS), corpus.fingerprint)
    assert found.row_groups.tolist() == corpus.row_groups.tolist()
    assert found.stored_tokens.tolist() == [13, 30, 11, 20, 1]
    assert found.read(2, 3, 9).tolist() == document_of(2, 30)[3:9].tolist()


def test_row_groups_without_a_document_in_range_are_left_out(corpus):
    found = Documents(corpus, LengthRange(4, 10))
    assert found.lengths.tolist() == [10, 4, 5]
    assert found.row_groups.tolist() == [0, 1, 3]
    assert found.stored_tokens.tolist() == [13, 11]
    assert [found.read(n, 0, 4).tolist() for n in range(3)] == [
        document_of(n, LENGTHS[n])[:4].tolist() for n in (0, 3, 4)
    ]
    assert found.fingerprint != corpus.fingerprint


def test_there_may_be_none(corpus):
    found = Documents(corpus, LengthRange(31))
    assert (len(found), found.tokens, found.row_groups.tolist()) == (0, 0, [0])
