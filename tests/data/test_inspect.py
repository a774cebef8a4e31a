"""`longctx data inspect`: what a corpus holds."""

import pytest
from rich.console import Console

from longctx.data.inspect import inspect
from longctx.errors import UserError
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


def test_documents_and_tokens_beyond_a_context_are_counted(tmp_path):
    """4,096 tokens are not longer than 4Ki; of 8,192, half stand beyond it."""
    text = shown(corpus_of(tmp_path / "corpus", [10] * 6 + [4096, 8192, 40_000], shard_tokens=2**20))
    tokens = 60 + 4096 + 8192 + 40_000
    table = text[text.index("long documents of train") : text.index("longest documents")].split("\n")
    assert [line.split() for line in table[2:5]] == [
        ["4,096", "2", f"{48_192 / tokens:.2%}", f"{(4096 + 35_904) / tokens:.2%}"],
        ["32,768", "1", f"{40_000 / tokens:.2%}", f"{7232 / tokens:.2%}"],
        ["131,072", "0", "0.00%", "0.00%"],
    ]


def test_the_histogram_marks_every_length(tmp_path):
    text = shown(corpus_of(tmp_path / "corpus", [2] * 400 + [5000]))
    lines = [line.split() for line in text.split("\n") if "–" in line]
    assert lines[0][:3] + lines[0][4:] == ["2", "–", "3", "400"]
    assert lines[-1] == ["4,096", "–", "8,191", "█", "1"]
    assert len(lines) == 12


def test_names_and_text_are_shown_and_not_obeyed(tmp_path):
    """A title, a colour, a line that looks like another; of documents, a tokenizer, skipped files and the folder."""
    escape = "\x1b]0;owned\x07\x9b31m"
    files = {f"{escape}{n}.txt": f"{escape}text\n\tof two lines" for n in range(3)} | {f"{escape}bad.txt": b"\xff"}
    folder = write_tree(tmp_path / f"in{escape}\nerror: none", files)
    tokenizer = write_tokenizer(tmp_path / f"fox{escape}" / "tokenizer.json")
    out = tmp_path / f"out{escape}"
    prepared([folder], out, tokenizer=str(tokenizer), workers=1, on_error="skip", heldout=0)
    text = shown(out)
    assert set(text) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160)])) == set()
    assert "\nerror: none" not in text
    shown_escape = "\\x1b]0;owned\\x07\\x9b31m"
    for name in (
        f"out{shown_escape}",
        f"fox{shown_escape}",
        f"in{shown_escape}\\nerror: none",
        f"{shown_escape}bad.txt",
    ):
        assert name in text
    assert f"{shown_escape}text\n        of two lines" in text


@pytest.mark.parametrize("content", ["no json", "[1]", "3", '{"where": "a"}', "[" * 100_000])
def test_a_damaged_list_of_skipped_input_is_named(tmp_path, content):
    folder = write_tree(tmp_path / "in", {"a.txt": "text", "bad.txt": b"\xff"})
    prepared([folder], tmp_path / "out", on_error="skip", heldout=0)
    (tmp_path / "out" / "errors.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"out/errors\.jsonl: damaged"):
        shown(tmp_path / "out")
