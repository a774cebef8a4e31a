"""Preparation: which documents come of which input, where they go, and what the manifest says of them."""

import gzip
import hashlib
import lzma
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from longctx.data import encode, shards
from longctx.data.corpus import Corpus
from longctx.data.manifest import Manifest
from longctx.data.progress import PreparationProgress
from longctx.errors import UserError
from tests.data.cases import prepared, texts, write_lines, write_parquet, write_tokenizer, write_tree


@pytest.fixture
def book(tmp_path):
    return write_tree(
        tmp_path / "book", {"b.txt": "second", "a/z.txt": "first\n", "c.md": "é", ".git/x": "no", "d/.hidden": "no"}
    )


def test_a_file_is_a_document(book, tmp_path):
    manifest = prepared([book], tmp_path / "out")
    assert texts(tmp_path / "out") == {"book/a/z.txt": "first\n", "book/b.txt": "second", "book/c.md": "é"}
    assert manifest.passed_over == {"hidden": 2}
    (entry,) = manifest.inputs
    assert (entry.name, entry.files, entry.documents, entry.tokens) == ("book", 3, 3, 7 + 7 + 3)


def test_suffixes_and_exclude_choose_within_folders(book, tmp_path):
    manifest = prepared([book], tmp_path / "one", suffixes=[".txt"], exclude=["a"])
    assert texts(tmp_path / "one") == {"book/b.txt": "second"}
    assert manifest.passed_over == {"hidden": 2, "excluded": 1, "other suffix": 1}
    prepared([book / "c.md"], tmp_path / "two", suffixes=[".txt"])
    assert texts(tmp_path / "two") == {"c.md": "é"}
    with pytest.raises(UserError, match=r"no file to prepare.*3 ignored: other suffix"):
        prepared([book], tmp_path / "three", suffixes=[".rs"])
    with pytest.raises(UserError, match="'txt' has no dot"):
        prepared([book], tmp_path / "three", suffixes=["txt"])


def test_join_folder_makes_one_document_of_each_folder(book, tmp_path):
    single = write_tree(tmp_path, {"single.txt": "alone"}) / "single.txt"
    prepared([book, single], tmp_path / "out", join="folder")
    assert texts(tmp_path / "out") == {
        "book": "==> book/a/z.txt <==\nfirst\n\n==> book/b.txt <==\nsecond\n==> book/c.md <==\né\n",
        "single.txt": "alone",
    }
    with pytest.raises(UserError, match="none of the inputs is a folder"):
        prepared([single], tmp_path / "none", join="folder")


def test_lines_and_rows_are_documents(tmp_path):
    lines = write_lines(tmp_path / "l.jsonl", [{"body": "one"}, b"", {"n": 1, "body": "zwölf"}])
    rows = write_parquet(tmp_path / "p.parquet", ["drei", "vier", "fünf"], column="body", row_group_size=2)
    prepared([lines, rows], tmp_path / "out", column="body")
    assert texts(tmp_path / "out") == {
        "l.jsonl:1": "one",
        "l.jsonl:3": "zwölf",
        "p.parquet:1": "drei",
        "p.parquet:2": "vier",
        "p.parquet:3": "fünf",
    }


@pytest.mark.parametrize("join", ["none", "folder"])
def test_a_long_text_is_whole_whatever_the_pieces_cut(tmp_path, monkeypatch, join):
    monkeypatch.setattr(encode, "PIECE_BYTES", 16)
    long = "ein paar Wörter\nmit Zeilen\n" * 5 + "€" * 40 + "\n\n" + "x" * 100
    folder = write_tree(tmp_path / "in", {"a.txt": long})
    write_lines(folder / "b.jsonl", [{"text": long}])
    write_parquet(folder / "c.parquet", [long])
    prepared([folder], tmp_path / "out", join=join)
    found = texts(tmp_path / "out")
    if join == "none":
        assert set(found.values()) == {long}
    else:
        names = ("in/a.txt", "in/b.jsonl:1", "in/c.parquet:1")
        assert found == {"in": "".join(f"==> {name} <==\n{long}\n" for name in names)}


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    folder = write_tree(tmp_path / "in", {f"{n}.txt": f"the lazy fox {n} " * n for n in range(1, 60)})
    tokenizer = str(write_tokenizer(tmp_path / "fox" / "tokenizer.json"))
    monkeypatch.setattr("longctx.data.prepare.PIECE_BYTES", 2000)
    one, two = (
        prepared([folder], tmp_path / f"out{workers}", tokenizer=tokenizer, workers=workers, heldout=0.2)
        for workers in (1, 2)
    )
    assert one == two
    assert len(texts(tmp_path / "out2")) + len(texts(tmp_path / "out2", "heldout")) == 59


def test_workers_import_no_torch():
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(
        1, get_context("spawn"), initializer=encode._start_worker, initargs=("bytes", None)
    ) as pool:
        imported = pool.submit(eval, "set(__import__('sys').modules)").result()
    assert "longctx.data.encode" in imported
    assert not imported & {"torch", "pyarrow"}


def test_a_worker_that_dies_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_work", eval)
    monkeypatch.setattr("longctx.data.prepare._jobs", lambda batch: "__import__('os')._exit(9)")
    folder = write_tree(tmp_path / "in", {"a.txt": "text"})
    with pytest.raises(UserError, match=r"processes died.*--workers 1"):
        prepared([folder], tmp_path / "out", workers=2)
    assert os.listdir(tmp_path) == ["in"]


def test_held_out_documents_are_chosen_by_name(tmp_path):
    folder = write_tree(tmp_path / "in", {f"{n}.txt": "text" for n in range(200)})
    manifest = prepared([folder], tmp_path / "out", heldout=0.2)
    held = set(texts(tmp_path / "out", "heldout"))
    assert 20 <= len(held) <= 60
    assert held.isdisjoint(texts(tmp_path / "out"))
    assert manifest.splits["heldout"].documents + manifest.splits["train"].documents == 200
    write_tree(folder, {f"more{n}.txt": "text" for n in range(50)})
    prepared([folder], tmp_path / "more", heldout=0.2)
    assert {name for name in texts(tmp_path / "more", "heldout") if "more" not in name} == held


def test_something_is_always_left_to_train_on(tmp_path):
    folder = write_tree(tmp_path / "in", {"a.txt": "text"})
    manifest = prepared([folder], tmp_path / "out", heldout=1 - 1e-12)
    assert texts(tmp_path / "out") == {"in/a.txt": "text"}
    assert manifest.splits["heldout"].documents == 0
    assert not (tmp_path / "out" / "heldout").exists()
    with pytest.raises(UserError, match=r"'heldout' has no documents.*--heldout"):
        Corpus(tmp_path / "out", "heldout")


def test_the_manifest_reports_what_is_there(tmp_path):
    folder = write_tree(tmp_path / "in", {f"{n:02}.txt": "x" * n for n in range(1, 33)})
    manifest = prepared([folder], tmp_path / "out", shard_tokens=100)
    split = manifest.splits["train"]
    total = sum(range(2, 34))
    assert (split.documents, split.tokens, split.lengths) == (32, total, (0, 2, 4, 8, 16, 2))
    assert len(split.shards) > 2
    assert sum(shard.tokens for shard in split.shards) == total
    assert all(shard.tokens >= 100 for shard in split.shards[:-1])
    for shard in split.shards:
        content = (tmp_path / "out" / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (manifest.tokenizer.name, manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id) == ("bytes", 257, 256)
    assert Manifest.load(tmp_path / "out") == manifest


def test_a_row_is_a_document(tmp_path):
    prepared([write_tree(tmp_path / "in", {"a": "ab", "b": "c"})], tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "train" / "shard-00000.parquet")
    assert table.to_pydict() == {
        "tokens": [[97, 98, 256], [99, 256]],
        "length": [3, 2],
        "source": ["in/a", "in/b"],
    }
    assert table.schema.field("tokens").type.value_type == "uint16"


def test_a_copy_of_the_tokenizer_lies_beside_the_manifest(tmp_path):
    path = write_tokenizer(tmp_path / "fox" / "tokenizer.json")
    prepared([write_tree(tmp_path / "in", {"a": "the dog"})], tmp_path / "out", tokenizer=str(path), workers=1)
    content = path.read_bytes()
    path.unlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    assert texts(tmp_path / "out") == {"in/a": "the dog"}
    write_tokenizer(tmp_path / "out" / "tokenizer.json", end="</s>")
    with pytest.raises(UserError, match="tokenizer"):
        texts(tmp_path / "out")


def test_a_file_name_that_is_no_utf8_is_kept_legibly(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    prepared([folder], tmp_path / "out")
    assert texts(tmp_path / "out") == {"in/caf\\xe9.txt": "text"}


def test_a_small_file_that_unpacks_to_more_than_a_document_is_stopped_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PIECE_BYTES", 2**16)
    monkeypatch.setattr("longctx.data.prepare.PIECE_BYTES", 2**16)
    monkeypatch.setattr(shards, "LONGEST_DOCUMENT", 2**20)
    folder = write_tree(tmp_path / "in", {"a.txt.gz": gzip.compress(b"a line\n" * 2**23)})
    read = []
    monkeypatch.setattr(encode.Encoder, "__call__", counting(encode.Encoder.__call__, read))
    with pytest.raises(UserError, match=r"a\.txt\.gz: a document of more than 1048576 tokens, the limit"):
        prepared([folder], tmp_path / "out", on_error="skip")
    assert sum(read) < 2**21


def counting(call, read):
    """The encoder's call, which notes the bytes that it is given."""

    def noted(encoder, jobs):
        read.append(sum(len(job.data) for job in jobs))
        return call(encoder, jobs)

    return noted


def corpus(directory):
    """The files of a corpus, but for the paths of its inputs."""
    found = {path.name: path.read_bytes() for path in directory.rglob("*.parquet")}
    return found, Manifest.load(directory).model_copy(update={"inputs": ()})


def test_compressed_files_are_read_as_what_they_hold(tmp_path):
    rows = [{"text": f"document {number}"} for number in range(100)]
    plain = write_lines(tmp_path / "plain.jsonl", rows).read_bytes()
    (tmp_path / "l.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "t.txt.xz").write_bytes(lzma.compress("é".encode() * 1000))
    prepared([tmp_path / "l.jsonl.gz", tmp_path / "t.txt.xz"], tmp_path / "out")
    want = {f"l.jsonl.gz:{number + 1}": row["text"] for number, row in enumerate(rows)}
    assert texts(tmp_path / "out") == {**want, "t.txt.xz": "é" * 1000}


def data_set(tmp_path):
    """Files of a repository, which is pushed in another order than that of their names."""
    return {
        "b.jsonl.gz": gzip.compress(b'{"text": "three"}\n{"text": "four"}\n'),
        "c/d.txt": "five",
        "a.parquet": write_parquet(tmp_path / "a.parquet", ["one", "two"]).read_bytes(),
        "load.py": "import os; os._exit(9)",
    }


def test_a_data_set_of_the_hub_is_prepared_at_its_commit_again_and_again(hub, tmp_path):
    commit = hub.push("datasets/own/texts", data_set(tmp_path))
    tokenizer = hub.push("own/fox", {"tokenizer.json": write_tokenizer(tmp_path / "fox" / "t.json").read_bytes()})
    options = {"tokenizer": "own/fox", "workers": 1}
    manifest = prepared(["hf://datasets/own/texts"], tmp_path / "one", **options)
    assert list(texts(tmp_path / "one").items()) == [
        ("own/texts/a.parquet:1", "one"),
        ("own/texts/a.parquet:2", "two"),
        ("own/texts/b.jsonl.gz:1", "three"),
        ("own/texts/b.jsonl.gz:2", "four"),
        ("own/texts/c/d.txt", "five"),
    ]
    (entry,) = manifest.inputs
    assert (entry.path, entry.name, entry.commit) == ("hf://datasets/own/texts", "own/texts", commit)
    assert (manifest.tokenizer.name, manifest.tokenizer.commit) == ("own/fox", tokenizer)
    assert not any("load.py" in request for request in hub.requests)
    # The branch moves; the commit of the manifest does not.
    hub.push("datasets/own/texts", {"a.txt": "another"})
    hub.push("own/fox", {"tokenizer.json": "{}"})
    options["tokenizer"] = f"own/fox@{tokenizer}"
    prepared([f"hf://datasets/own/texts@{commit}"], tmp_path / "two", **options)
    assert corpus(tmp_path / "two") == corpus(tmp_path / "one")
    prepared(["hf://datasets/own/texts"], tmp_path / "three", **options)
    assert texts(tmp_path / "three") == {"own/texts/a.txt": "another"}


def test_a_data_set_of_the_hub_may_be_one_document(hub, tmp_path):
    hub.push("datasets/own/texts", {"b.txt": "two", "a.txt": "one"})
    prepared(["hf://datasets/own/texts"], tmp_path / "out", join="folder")
    assert texts(tmp_path / "out") == {"own/texts": "==> own/texts/a.txt <==\none\n==> own/texts/b.txt <==\ntwo\n"}


def test_a_hub_that_fails_stops_the_preparation_and_what_it_gave_is_kept(hub, tmp_path, monkeypatch):
    """With --on-error skip too: the network would decide what the corpus has."""
    hub.push("datasets/own/texts", {"a.txt": "one", "b.txt": "two"})
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub asks again
    answer = hub.answer

    def failing(method, path, body):
        return (503, {}, b"") if "b.txt" in path else answer(method, path, body)

    monkeypatch.setattr(hub, "answer", failing)
    with pytest.raises(UserError, match=r"^input hf://datasets/own/texts: b.txt: the Hub gives no answer .*503"):
        prepared(["hf://datasets/own/texts"], tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(hub, "answer", answer)
    hub.requests.clear()
    prepared(["hf://datasets/own/texts"], tmp_path / "out", on_error="skip")
    assert texts(tmp_path / "out") == {"own/texts/a.txt": "one", "own/texts/b.txt": "two"}
    assert [request for request in hub.requests if request.startswith("GET") and "a.txt" in request] == []


def test_a_store_is_prepared_as_a_folder_is(tmp_path):
    files = {name: data if isinstance(data, bytes) else data.encode() for name, data in data_set(tmp_path).items()}
    folder = write_tree(tmp_path / "in", files)
    MemoryFileSystem().pipe({f"/bucket/in/{name}": data for name, data in files.items()})
    try:
        manifest = prepared(["memory://bucket/in"], tmp_path / "one")
    finally:
        MemoryFileSystem().rm("/bucket", recursive=True)
    prepared([folder], tmp_path / "two")
    assert corpus(tmp_path / "one") == corpus(tmp_path / "two")
    assert (manifest.inputs[0].path, manifest.inputs[0].commit) == ("memory://bucket/in", None)


def test_progress_moves_while_one_document_is_read_and_says_that_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("longctx.data.prepare.PIECE_BYTES", 100)
    monkeypatch.setattr("longctx.data.prepare.ROW_GROUP_TOKENS", 100)
    told = []
    monkeypatch.setattr(PreparationProgress, "update", lambda self, *counts: told.append(counts))
    monkeypatch.setattr(PreparationProgress, "announce", lambda self, doing: told.append(doing))
    folder = write_tree(tmp_path / "in", {f"{n}.txt": "x" * 85 for n in range(3)})
    prepared([folder], tmp_path / "out", join="folder")
    item = 85 + len("==> in/0.txt <==\n\n")
    assert told == [
        *((85, 0, item * n) for n in (1, 2, 3)),
        (0, 0, item * 3),
        "writing in",
        "",
        (0, 1, 3 * item + 1),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"join": "book"}, "--join 'book'"),
        ({"on_error": "ignore"}, "--on-error 'ignore'"),
        ({"heldout": 1.0}, "--heldout 1.0"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"workers": 0}, "--workers 0"),
    ],
)
def test_options_are_checked(book, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepared([book], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_inputs_are_checked(book, tmp_path):
    with pytest.raises(UserError, match="name at least one"):
        prepared([], tmp_path / "out")
    with pytest.raises(UserError, match=r"missing: No such file"):
        prepared([tmp_path / "missing"], tmp_path / "out")
    with pytest.raises(UserError, match="prepared twice"):
        prepared([book, book / "b.txt"], tmp_path / "out")
    with pytest.raises(UserError, match="is inside the input"):
        prepared([book], book / "out")


def test_a_document_may_hold_millions_of_tokens(tmp_path):
    line = "".join(map(chr, range(32, 127))) + "\n"
    folder = write_tree(tmp_path / "in", {"a.txt": line * 20000, "b.txt": line * 20000})
    manifest = prepared([folder], tmp_path / "out", join="folder")
    corpus = Corpus(tmp_path / "out")
    assert corpus.documents == 1
    assert corpus.tokens == manifest.splits["train"].tokens == 2 * 20000 * 96 + 2 * len("==> in/a.txt <==\n\n") + 1
    start = len("==> in/a.txt <==\n") + 19999 * 96
    assert bytes(corpus.read(0, start, start + 96).astype(np.uint8)).decode() == line
