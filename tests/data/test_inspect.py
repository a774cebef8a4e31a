"""`longctx data inspect`: what a corpus holds."""

from rich.console import Console

from longctx.data.inspect import inspect
from tests.data.cases import corpus_of, prepared, write_tokenizer, write_tree


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
