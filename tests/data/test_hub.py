"""Repositories of the Hub: names, commits, files, and one clear error for each thing that may be wrong."""

import errno

import huggingface_hub
import pytest

from longctx.data.hub import Repository, UnreachableError, is_commit, parse_data_set, parse_model
from longctx.errors import UserError

MODEL = Repository("model", "own/fox")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("own/fox", ("own/fox", None)),
        ("hf://own/fox", ("own/fox", None)),
        ("own/fox-1.5_b@v1.0", ("own/fox-1.5_b", "v1.0")),
        ("own/fox@refs/pr/1", ("own/fox", "refs/pr/1")),
    ],
)
def test_a_model_is_its_owner_and_name_and_perhaps_a_revision(text, want):
    repository = parse_model(text)
    assert (repository.kind, repository.name, repository.revision) == ("model", *want)


@pytest.mark.parametrize(
    "text", ["fox", "./own/fox", "../fox", "/own/fox", "own/fox/tokenizer.json", "own/t.json", "~/fox", "own/fox@", ""]
)
def test_paths_are_no_models(text):
    assert parse_model(text) is None
    with pytest.raises(UserError, match="names no repository of the Hub; write hf://OWNER/NAME"):
        parse_model(f"hf://{text}")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("hf://datasets/own/texts", ("own/texts", None, "")),
        ("hf://datasets/own/texts/", ("own/texts", None, "")),
        ("hf://datasets/own/texts@v1/a/b.txt", ("own/texts", "v1", "a/b.txt")),
        ("hf://datasets/own/texts@refs/convert/parquet/en/*", ("own/texts", "refs/convert/parquet", "en/*")),
        ("hf://datasets/own/texts@a%2Fb/c", ("own/texts", "a/b", "c")),
    ],
)
def test_a_data_set_has_a_revision_and_a_path(text, want):
    repository, path = parse_data_set(text)
    assert (repository.kind, repository.name, repository.revision, path) == ("dataset", *want)


@pytest.mark.parametrize("text", ["hf://own/texts/a.txt", "hf://datasets/texts", "hf://datasets/../texts/a"])
def test_what_names_no_data_set_is_refused_with_the_syntax(text):
    with pytest.raises(UserError, match=r"names no data set of the Hub; write hf://datasets/OWNER/NAME"):
        parse_data_set(text)


def test_only_a_full_name_of_a_commit_is_one():
    assert is_commit("0" * 40)
    assert not is_commit("0" * 7)
    assert not is_commit(None)


def test_a_revision_is_resolved_and_its_files_are_listed_and_fetched(hub):
    first = hub.push("datasets/own/texts", {"a.txt": "old", "b/c.txt": "c"}, branch="v1")
    second = hub.push("datasets/own/texts", {"a.txt": "newer"})
    old, new = (Repository("dataset", "own/texts", revision) for revision in ("v1", None))
    assert (old.commit(), new.commit()) == (first, second)
    assert old.list("", first) == {"a.txt": 3, "b/c.txt": 1}
    assert old.list("b", first) == {"b/c.txt": 1}
    assert old.list("none", first) is None
    assert (old.size("a.txt", first), old.size("none", first)) == (3, None)
    assert old.fetch("a.txt", first).read_text() == "old"
    assert new.fetch("a.txt", second).read_text() == "newer"
    assert old.fetch("none", first) is None


def test_what_has_been_fetched_is_not_asked_for_again(hub):
    commit = hub.push("own/fox", {"a": "x"})
    assert MODEL.fetch("a", commit, cached=True) is None
    path = MODEL.fetch("a", commit)
    hub.requests.clear()
    assert MODEL.fetch("a", commit) == MODEL.fetch("a", commit, cached=True) == path
    assert path.parent.name == commit
    assert hub.requests == []


def test_what_does_not_exist_or_may_not_be_read_is_named_with_what_to_do(hub):
    commit = hub.push("own/fox", {"a": "x"})
    page = f"{hub.url}/own/fox"
    with pytest.raises(UserError, match="the Hub has no model own/cat, or it is private: correct the name, or log in"):
        Repository("model", "own/cat").commit()
    with pytest.raises(UserError, match="the Hub has no data set own/fox, or it is private"):
        Repository("dataset", "own/fox").commit()
    with pytest.raises(UserError, match=f"own/fox has no revision 'v2': name a branch, a tag or a commit of {page}"):
        Repository("model", "own/fox", "v2").commit()
    with pytest.raises(UserError, match="own--fox/x is no name of a repository"):
        Repository("model", "own--fox/x").commit()
    hub.gated.add("own/fox")
    assert MODEL.commit() == commit
    for call in (MODEL.check, MODEL.fetch):
        with pytest.raises(UserError, match=f"own/fox is gated: accept its terms at {page}, and log in"):
            call("a", commit)


def test_offline_is_told_from_a_hub_that_gives_no_answer(hub, monkeypatch):
    hub.push("own/fox", {"a": "x"})
    hub.status = 500
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub asks again
    with pytest.raises(UnreachableError, match=f"the Hub gives no answer .{hub.url}/own/fox: .*500"):
        MODEL.commit()


def test_offline_nothing_is_asked(hub, offline):
    hub.push("own/fox", {"a": "x"})
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        MODEL.commit()
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        MODEL.fetch("a", "main")
    assert hub.requests == []


def test_a_full_disk_is_no_fault_of_the_hub(hub, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device; make room there, or set HF_HUB_C"):
        MODEL.fetch("a", "main")


def test_a_file_of_another_place_is_refused(hub, tmp_path):
    commit = hub.push("own/fox", {"../../../../x": "x"})
    with pytest.raises(UserError, match=r"x leads out of the repository own/fox"):
        MODEL.fetch("../../../../x", commit)
    assert not (tmp_path.parent / "x").exists()
