"""Random access to documents, at bounded memory, from shards that may be damaged."""

import json
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.corpus import Corpus
from longctx.errors import UserError
from tests.data.cases import corpus_of, document_of

LENGTHS = [5, 1, 9, 200, 3, 16, 17, 2, 2, 2, 64, 30]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return corpus_of(tmp_path_factory.mktemp("corpus") / "corpus", LENGTHS)


@settings(deadline=None)
@given(st.data())
def test_any_part_of_any_document(directory, data):
    corpus = Corpus(directory, cache_tokens=data.draw(st.sampled_from([0, 40, 10**6])))
    for _ in range(20):
        document = data.draw(st.integers(0, len(LENGTHS) - 1))
        start = data.draw(st.integers(0, LENGTHS[document]))
        stop = data.draw(st.integers(start, LENGTHS[document]))
        found = corpus.read(document, start, stop)
        assert found.dtype == np.uint16
        assert not found.flags.writeable  # it is a view of what the cache holds
        np.testing.assert_array_equal(found, document_of(document, LENGTHS[document])[start:stop])


def test_it_knows_its_documents_without_their_tokens(directory, monkeypatch):
    columns = []
    read = Corpus._open

    def watch(self, shard):
        parquet = read(self, shard)
        inner = parquet.read_row_group
        parquet.read_row_group = lambda *args, **options: columns.append(options["columns"]) or inner(*args, **options)
        return parquet

    monkeypatch.setattr(Corpus, "_open", watch)
    corpus = Corpus(directory)
    assert corpus.lengths.tolist() == LENGTHS
    assert (corpus.documents, corpus.tokens, corpus.vocab_size) == (12, sum(LENGTHS), 257)
    assert set(map(tuple, columns)) == {("length",)}


def test_a_document_longer_than_a_row_group_has_one_of_its_own(directory):
    groups = Corpus(directory).row_groups.tolist()
    assert groups == [0, 3, 4, 5, 6, 7, 10, 11, 12]


def test_sources(directory):
    corpus = Corpus(directory)
    assert [corpus.source(document) for document in (0, 3, 11)] == ["document 0", "document 3", "document 11"]


def test_a_part_beyond_the_document_is_refused(directory):
    corpus = Corpus(directory)
    for start, stop in ((0, 6), (-1, 3), (4, 3)):
        with pytest.raises(IndexError, match="document 0, which has 5"):
            corpus.read(0, start, stop)


def test_the_cache_is_bounded_and_keeps_what_was_used_last(directory, monkeypatch):
    corpus = Corpus(directory, cache_tokens=40)
    decoded = []
    decode = corpus._decode
    monkeypatch.setattr(corpus, "_decode", lambda group: decoded.append(group) or decode(group))
    for document in (0, 4, 0, 1, 2, 5, 0):
        corpus.read(document)
    assert decoded == [0, 2, 3]
    corpus.read(3)
    assert list(corpus._cache) == [1]  # larger than the cache, and still held while it is in use
    corpus.read(3, 100, 110)
    assert decoded == [0, 2, 3, 1]


def test_threads_share_it(directory):
    corpus = Corpus(directory, cache_tokens=30)
    wrong = []

    def work(seed):
        random = np.random.default_rng(seed)
        documents = random.integers(0, len(LENGTHS), 200).tolist()
        wrong.extend(n for n in documents if not np.array_equal(corpus.read(n), document_of(n, LENGTHS[n])))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch)
    assert not wrong
    assert corpus._cached == sum(len(values) for values, _ in corpus._cache.values()) <= 30 + 200


def test_a_shard_damaged_in_mid_training_is_named(tmp_path):
    directory = corpus_of(tmp_path / "corpus", [1000, 1000], row_group_tokens=1000, shard_tokens=1000)
    corpus = Corpus(directory)
    shard = directory / "train" / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[300] ^= 0x10  # within the page of the tokens: only its checksum can tell
    shard.write_bytes(content)
    corpus.read(0)
    with pytest.raises(UserError, match=r"train/shard-00001\.parquet cannot be read: row group 0: .*copy it again"):
        corpus.read(1)
    shard.unlink()
    with pytest.raises(UserError, match=r"train/shard-00001\.parquet cannot be read"):
        corpus.read(1)


def test_a_shard_of_another_corpus_is_refused(tmp_path):
    one, other = (corpus_of(tmp_path / name, lengths) for name, lengths in (("one", [5, 6]), ("other", [6, 5])))
    shard = "train/shard-00000.parquet"
    corpus = Corpus(one)
    (one / shard).write_bytes((other / shard).read_bytes())
    with pytest.raises(UserError, match=r"shard-00000\.parquet cannot be read: row group 0: lengths differ"):
        corpus.read(0)


def test_a_shard_that_is_not_parquet_stops_before_the_first_step(tmp_path):
    directory = corpus_of(tmp_path / "corpus", [5, 6])
    shard = directory / "train" / "shard-00000.parquet"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"shard-00000\.parquet cannot be read"):
        Corpus(directory)


def test_a_bit_that_flips_in_a_footer_is_noticed_and_before_there_were_digests_never_a_crash(tmp_path):
    """A footer has no checksum of its own: of an earlier version's corpus, some of these change tokens unseen."""
    directory = corpus_of(tmp_path / "corpus", [5, 600])
    shard, manifest = directory / "train" / "shard-00000.parquet", directory / "manifest.json"
    content, now = shard.read_bytes(), json.loads(manifest.read_text())
    old = json.loads(manifest.read_text())
    for entry in old["splits"]["train"]["shards"]:
        del entry["footer"]
    length = int.from_bytes(content[-8:-4], "little") + 8
    bits = range(0, 8 * length, 13)
    for version, flips in ((now, bits), (old, bits)):
        manifest.write_text(json.dumps(version))
        told = []
        for bit in flips:
            changed = bytearray(content)
            changed[len(content) - length + bit // 8] ^= 1 << bit % 8
            shard.write_bytes(changed)
            try:
                corpus = Corpus(directory)
                for document in range(corpus.documents):
                    corpus.read(document)
                    corpus.source(document)
            except UserError as error:
                told.append(str(error))
        assert all("shard-00000.parquet cannot be read" in text for text in told)
        assert len(told) == len(flips) if version is now else told
