"""The manifest refuses a directory that is incomplete or was changed."""

import json

import pytest

from longctx.data.manifest import Manifest
from longctx.errors import UserError
from tests.data.cases import corpus_of


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


@pytest.mark.parametrize("elsewhere", ["/etc/passwd", "../other/shard.parquet", "train/../../shard.parquet"])
def test_a_file_outside_of_the_directory(corpus, elsewhere):
    content = json.loads((corpus / "manifest.json").read_text())
    content["splits"]["train"]["shards"][0]["file"] = elsewhere
    change(corpus, **content)
    assert "is not inside the corpus" in refusal(corpus)


def test_a_tokenizer_outside_of_the_directory(corpus):
    tokenizer = json.loads((corpus / "manifest.json").read_text())["tokenizer"]
    change(corpus, tokenizer=tokenizer | {"file": "../tokenizer.json"})
    assert "is not inside the corpus" in refusal(corpus)


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
