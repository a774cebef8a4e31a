"""The manifest refuses a directory that is not whole; `inspect` shows one that is."""

import json

import pytest
from rich.console import Console

from longctx.data.inspect import inspect
from longctx.data.manifest import Manifest
from longctx.errors import UserError
from tests.data.cases import corpus_of, prepared, write_tokenizer, write_tree


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path / "corpus", [5, 9, 20, 3], shard_tokens=16)


def change(corpus, **values):
    path = corpus / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(corpus):
    with pytest.raises(UserError) as error:
        Manifest.load(corpus)
    assert f"longctx data prepare INPUT… --out {corpus}" in str(error.value)
    return str(error.value)


def test_a_whole_directory_loads(corpus):
    manifest = Manifest.load(str(corpus))
    assert manifest.splits["train"].documents == 4
    manifest.verify(corpus)


def test_a_missing_directory(tmp_path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")


def test_a_directory_that_was_not_prepared(tmp_path):
    assert "is not a prepared corpus: it has no manifest.json" in refusal(tmp_path)


def test_a_manifest_of_something_else(corpus):
    change(corpus, format="npm")
    assert "not the manifest of a prepared corpus" in refusal(corpus)


def test_another_version(corpus):
    change(corpus, version=2)
    assert "format version 2, but this longctx reads version 1" in refusal(corpus)


def test_a_damaged_manifest(corpus):
    change(corpus, inputs=7)
    assert "manifest.json: damaged: inputs" in refusal(corpus)
    (corpus / "manifest.json").write_text("{")
    assert "manifest.json: damaged, not JSON" in refusal(corpus)


def test_a_missing_shard(corpus):
    (corpus / "train" / "shard-00001.parquet").unlink()
    assert "train/shard-00001.parquet: No such file" in refusal(corpus)


def test_a_truncated_shard(corpus):
    shard = corpus / "train" / "shard-00001.parquet"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-5])
    assert f"shard-00001.parquet: has {size - 5} bytes, but the manifest lists {size}" in refusal(corpus)


def test_verify_names_a_shard_whose_content_changed(corpus):
    shard = corpus / "train" / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.parquet: its content is damaged"):
        Manifest.load(corpus).verify(corpus)


def test_the_fingerprint_follows_the_tokens(corpus, tmp_path):
    def fingerprint(name, lengths):
        return Manifest.load(corpus_of(tmp_path / name, lengths, shard_tokens=16)).fingerprint("train")

    assert fingerprint("same", [5, 9, 20, 3]) == Manifest.load(corpus).fingerprint("train")
    assert fingerprint("other", [5, 9, 3, 20]) != Manifest.load(corpus).fingerprint("train")


def shown(directory, **options):
    console = Console(width=300)
    with console.capture() as capture:
        console.print(inspect(directory, **options))
    return capture.get()


def test_inspect_shows_what_is_there(tmp_path):
    files = {f"{n:02}.txt": "the lazy fox " * n for n in range(1, 31)} | {"bad.txt": b"\xff", "00.txt": "[bold]a dog"}
    tokenizer = write_tokenizer(tmp_path / "fox" / "tokenizer.json")
    folder = write_tree(tmp_path / "in", files)
    manifest = prepared([folder], tmp_path / "out", tokenizer=str(tokenizer), workers=1, on_error="skip", heldout=0.2)
    text = shown(tmp_path / "out", verify=True)
    assert "every shard's content verified" in text
    assert f"tokenizer fox: vocabulary {manifest.tokenizer.vocab_size}" in text
    assert "(<|endoftext|>)" in text
    assert f"from {folder}: 32 files, 31 documents" in " ".join(text.split())
    for name, split in manifest.splits.items():
        assert f" {name} {split.documents} {split.tokens:,} " in " ".join(text.split())
        assert f"{name}: documents by length" in text
    assert "1 invalid UTF-8" in text
    assert "bad.txt: invalid UTF-8: byte 0" in text.replace("\n", "")
    assert "sample: in/00.txt" in text
    assert "[bold]a dog<|endoftext|>" in text


def test_the_longest_documents_come_first(tmp_path):
    text = shown(corpus_of(tmp_path / "corpus", [5, 9, 2000, 3, 7, 30, 2]))
    longest = text[text.index("longest documents") : text.index("sample:")].split("\n")[1:6]
    assert [line.split()[:3] for line in longest] == [
        ["2,000", "document", "2"],
        ["30", "document", "5"],
        ["9", "document", "1"],
        ["7", "document", "4"],
        ["5", "document", "0"],
    ]


def test_the_histogram_marks_every_length(tmp_path):
    text = shown(corpus_of(tmp_path / "corpus", [2] * 400 + [5000]))
    lines = [line.split() for line in text.split("\n") if "–" in line]
    assert lines[0][:3] + lines[0][4:] == ["2", "–", "3", "400"]
    assert lines[-1] == ["4,096", "–", "8,191", "█", "1"]
    assert len(lines) == 12
