"""Files of the inputs: which are found, on this machine, in data sets of the Hub and in object stores."""

import os

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import constants

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


TEXTS = {
    "data/train-1.jsonl": "{}",
    "data/train-0.jsonl.gz": "x",
    "data/.x.jsonl": "",
    "extra/a.txt": "a",
    "run.py": "1/0",
}


def listed(url, **options):
    (source,) = discover([url], **options)
    return names(source)


def test_the_files_of_data_of_a_repository_are_found_in_order_with_its_commit(hub):
    commit = hub.push("datasets/own/texts", {**TEXTS, "README.md": "#", ".gitattributes": "", "p.parquet": "p"})
    (source,) = discover(["hf://datasets/own/texts"])
    assert (source.name, source.commit, source.is_folder, source.is_local) == ("own/texts", commit, True, False)
    assert [file.path for file in source.files] == [
        f"hf://datasets/own/texts@{commit}/{name}"
        for name in ("data/train-0.jsonl.gz", "data/train-1.jsonl", "extra/a.txt", "p.parquet")
    ]
    assert names(source) == [file.path.replace("hf://datasets/", "").replace(f"@{commit}", "") for file in source.files]
    assert [file.size for file in source.files] == [1, 2, 1, 1]
    assert source.passed_over == {"hidden": 2, "not a file of data": 2}


@pytest.mark.parametrize(
    ("path", "options", "want"),
    [
        ("data", {}, ["data/train-0.jsonl.gz", "data/train-1.jsonl"]),
        ("data/train-1.jsonl", {}, ["data/train-1.jsonl"]),
        ("run.py", {}, ["run.py"]),
        ("data/*.jsonl", {}, ["data/.x.jsonl", "data/train-1.jsonl"]),
        ("**/*.gz", {}, ["data/train-0.jsonl.gz"]),
        ("*/a.txt", {}, ["extra/a.txt"]),
        ("", {"suffixes": [".py"]}, ["run.py"]),
        ("", {"exclude": ["data"]}, ["extra/a.txt"]),
    ],
)
def test_a_file_a_folder_or_a_pattern_selects(hub, path, options, want):
    hub.push("datasets/own/texts", TEXTS)
    assert listed(f"hf://datasets/own/texts/{path}", **options) == [f"own/texts/{name}" for name in want]


def test_a_document_has_one_name_however_it_is_selected_and_is_read_once(hub):
    commit = hub.push("datasets/own/texts", TEXTS)
    with pytest.raises(UserError, match=f"@{commit}/data/train-1.jsonl would be prepared twice, by the inputs hf://"):
        discover(["hf://datasets/own/texts/data", "hf://datasets/own/texts@main/data/train-1.jsonl"])


def test_data_sets_that_cannot_be_read_are_refused_before_anything_is(hub):
    commit = hub.push("datasets/own/texts", TEXTS)
    with pytest.raises(UserError, match=f"own/texts has no such file or folder at commit {commit}"):
        discover(["hf://datasets/own/texts/dat"])
    with pytest.raises(UserError, match=r"^input hf://datasets/own/none: the Hub has no data set own/none"):
        discover(["hf://datasets/own/none"])
    with pytest.raises(UserError, match=r"has no file to prepare \(.*4 ignored: other suffix"):
        discover(["hf://datasets/own/texts"], suffixes=[".parquet"])
    with pytest.raises(UserError, match=r"is a web page; write hf://datasets/own/texts$"):
        discover(["https://huggingface.co/datasets/own/texts/tree/main"])
    hub.gated.add("datasets/own/texts")
    with pytest.raises(UserError, match=r"^input hf://datasets/own/texts: own/texts is gated"):
        discover(["hf://datasets/own/texts"])


def test_offline_a_file_that_is_named_with_its_commit_is_read_from_the_cache(hub, monkeypatch):
    commit = hub.push("datasets/own/texts", TEXTS)
    (online,) = discover(["hf://datasets/own/texts/extra/a.txt"])
    online.files[0].fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (source,) = discover([f"hf://datasets/own/texts@{commit}/extra/a.txt"])
    assert [(file.path, file.name, file.size) for file in source.files] == [
        (file.path, file.name, file.size) for file in online.files
    ]
    with open(source.files[0].fetch()) as stream:
        assert stream.read() == "a"
    for place in ("/extra/a.txt", f"@{commit}/data/train-1.jsonl", f"@{commit}/extra", f"@{commit}/*", ""):
        with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set. Only a file that is named with its commit"):
            discover([f"hf://datasets/own/texts{place}"])


@pytest.fixture
def store():
    """A store in memory."""
    files = MemoryFileSystem()
    files.pipe({"/bucket/in/b.txt": b"b", "/bucket/in/a/c.jsonl": b"{}", "/bucket/in/.h": b"", "/bucket/in/R.md": b"r"})
    yield "memory://bucket/in"
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("path", "options", "want"),
    [
        ("", {}, ["in/R.md", "in/a/c.jsonl", "in/b.txt"]),
        ("/", {"suffixes": [".txt"]}, ["in/b.txt"]),
        ("", {"exclude": ["a"]}, ["in/R.md", "in/b.txt"]),
        ("/b.txt", {"suffixes": [".md"]}, ["b.txt"]),
        ("/*.txt", {}, ["b.txt"]),
        ("/*/c.*", {}, ["a/c.jsonl"]),
    ],
)
def test_files_of_a_store_are_selected_as_those_of_a_folder(store, path, options, want):
    assert listed(f"{store}{path}", **options) == want


def test_a_store_that_has_no_such_file_is_refused(store):
    with pytest.raises(UserError, match=r"input memory://bucket/none: has no file to prepare \(an empty folder\)"):
        discover(["memory://bucket/none"])
