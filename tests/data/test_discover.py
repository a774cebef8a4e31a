"""Files of the inputs: which are found."""

import os

import pytest

from longctx.data.discover import BadInput, discover
from longctx.errors import UserError
from tests.data.cases import write_tree


def names(source):
    return [file.name for file in source.files]


@pytest.fixture
def folder(tmp_path):
    files = {"b.txt": "b", "a/c.txt": "c", "a/d.md": "d", ".hidden": "h", ".git/e.txt": "e", "build/f.txt": "f"}
    return write_tree(tmp_path / "in", files)


def test_files_are_sorted_by_name_and_hidden_ones_are_ignored(folder):
    (source,) = discover([str(folder)])
    assert (source.name, source.is_folder) == ("in", True)
    assert names(source) == ["in/a/c.txt", "in/a/d.md", "in/b.txt", "in/build/f.txt"]
    assert [file.size for file in source.files] == [1, 1, 1, 1]
    assert source.passed_over == {"hidden": 2}


@pytest.mark.parametrize(
    ("options", "want", "passed_over"),
    [
        ({"suffixes": [".txt"]}, ["in/a/c.txt", "in/b.txt", "in/build/f.txt"], {"hidden": 2, "other suffix": 1}),
        ({"exclude": ["build"]}, ["in/a/c.txt", "in/a/d.md", "in/b.txt"], {"hidden": 2, "excluded": 1}),
        ({"exclude": ["a/*.txt"]}, ["in/a/d.md", "in/b.txt", "in/build/f.txt"], {"hidden": 2, "excluded": 1}),
        ({"suffixes": [".md"], "exclude": ["b*"]}, ["in/a/d.md"], {"hidden": 2, "excluded": 2, "other suffix": 1}),
    ],
)
def test_suffixes_and_patterns_select_files_within_folders(folder, options, want, passed_over):
    (source,) = discover([str(folder)], **options)
    assert names(source) == want
    assert source.passed_over == passed_over


def test_an_input_that_is_a_file_is_always_read(folder):
    sources = discover([str(folder / ".hidden"), str(folder / "b.txt")], suffixes=[".md"], exclude=["*"])
    assert [(source.name, names(source), source.is_folder) for source in sources] == [
        (".hidden", [".hidden"], False),
        ("b.txt", ["b.txt"], False),
    ]


def test_links_to_folders_are_not_followed(folder):
    (folder / "link").symlink_to(folder / "a")
    (source,) = discover([str(folder)])
    assert source.passed_over["link to a folder"] == 1
    assert not any("link" in name for name in names(source))


def test_pipes_and_broken_links_are_bad_inputs_and_are_not_opened(folder):
    os.mkfifo(folder / "pipe")
    (folder / "broken").symlink_to(folder / "nowhere")
    (source,) = discover([str(folder)])
    assert source.bad_inputs == [
        BadInput(str(folder / "broken"), "unreadable", "No such file or directory"),
        BadInput(str(folder / "pipe"), "unreadable", "not a regular file"),
    ]


def test_inputs_that_cannot_be_prepared_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="name at least one file or folder"):
        discover([])
    with pytest.raises(UserError, match=r"suffix 'txt' has no dot: write '\.txt'"):
        discover([str(folder)], suffixes=["txt"])
    with pytest.raises(UserError, match=r"input '.*/no\\x00ne': embedded null byte; name a file"):
        discover([f"{tmp_path}/no\0ne"])
    with pytest.raises(UserError, match=f"input {tmp_path}/none: No such file or directory"):
        discover([str(tmp_path / "none")])
    with pytest.raises(UserError, match=f"b.txt would be prepared twice, by the inputs {folder} and {folder}/b.txt"):
        discover([str(folder), str(folder / "b.txt")])
    with pytest.raises(UserError, match=r"has no file to prepare \(2 ignored: hidden, 4 ignored: other suffix\)"):
        discover([str(folder)], suffixes=[".py"])
