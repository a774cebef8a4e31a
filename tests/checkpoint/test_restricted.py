"""Reading a checkpoint runs nothing that its files name."""

import io
import pickle
import shutil
from copy import deepcopy

import pytest
import torch
import torch.distributed.checkpoint as dcp

from longctx.checkpoint.restricted import METADATA, check_entries, read_metadata
from longctx.checkpoint.storage import Reader, read_tensors
from longctx.errors import UserError
from tests.checkpoint.payloads import spoil

OBJECTS = {
    "step": 7,
    "bytes": io.BytesIO(b"state"),
    "betas": (0.9, 0.95),
    "names": ["a", None, True],
    "nested": {"lr": 1e-3},
    "extra": torch.ones(2),
}


def state():
    return {"model": {"weight": torch.arange(6.0).view(2, 3).to(torch.bfloat16)}, **deepcopy(OBJECTS)}


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path):
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved"


def test_what_was_saved_is_read(folder):
    tensors = state()
    tensors["model"]["weight"].zero_()
    tensors |= {"step": 0, "betas": (0.0, 0.0), "nested": {"lr": 0.0}, "extra": torch.zeros(2)}
    read_tensors(folder, tensors)
    assert torch.equal(tensors["model"]["weight"], state()["model"]["weight"])
    assert {name: tensors[name] for name in ("step", "betas", "nested")} == {
        name: OBJECTS[name] for name in ("step", "betas", "nested")
    }
    check_entries(folder)


def test_the_metadata_is_torchs_own(folder):
    assert read_metadata(folder) == pickle.loads((folder / METADATA).read_bytes())
    reader = Reader(folder)
    assert reader.read_metadata().storage_meta.load_id == reader.load_id


@pytest.mark.parametrize("name", [METADATA, "step", "nested", "model"])  # the model's weight is a tensor
def test_a_payload_does_not_run(folder, tmp_path, name):
    mark = tmp_path / "mark"
    spoil(folder, mark, name)
    for read in (lambda: read_tensors(folder, state()), lambda: check_entries(folder)):
        with pytest.raises(UserError) as error:
            read()
        assert "io.open" in str(error.value)
        assert "weights_only" not in str(error.value)
        assert not mark.exists()
    # Unrestricted, it does.
    dcp.load(state(), storage_reader=dcp.FileSystemReader(folder), no_dist=True)  # noqa: TID251 - to compare
    assert mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("os", "system"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.filesystem", "FileSystem"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.serialization", "_get_layout.__globals__"),
    ],
)
def test_names_that_no_checkpoint_has_are_refused(tmp_path, module, name):
    names = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    (tmp_path / METADATA).write_bytes(b"\x80\x04" + names + b"\x93.")
    with pytest.raises(UserError, match=rf"\.metadata: it names {module}\.{name}, which is not part of a checkpoint"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/__0_0.distcp", "a/b"])
def test_files_outside_of_the_folder_are_not_read(folder, path):
    metadata = pickle.loads((folder / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = path
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="refers to a file outside of the checkpoint"):
        read_metadata(folder)


@pytest.mark.parametrize("content", [b"", b"nothing", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([3]))])
def test_what_is_no_metadata_is_refused(folder, content):
    (folder / METADATA).write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata: "):
        read_metadata(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"\.metadata: .*No such file"):
        read_metadata(folder)
