"""Safetensors folders: written and read back, and damage that is named before a tensor is read."""

import json

import pytest
import torch

from longctx.convert.tensor_files import (
    CONFIG,
    INDEX,
    SINGLE,
    TensorFolder,
    file_names,
    group_by_size,
    read_json,
    write_file,
    write_index,
    write_json,
)
from longctx.errors import UserError

TENSORS = {
    "vector": torch.arange(5, dtype=torch.float32),
    "matrix": torch.arange(12).view(4, 3).bfloat16(),
    "experts": torch.arange(24).view(4, 2, 3).half(),
}


@pytest.fixture
def numbered(tmp_path):
    """Two files with an index."""
    names = file_names(2)
    write_file(tmp_path / names[0], {"vector": TENSORS["vector"], "matrix": TENSORS["matrix"]})
    write_file(tmp_path / names[1], {"experts": TENSORS["experts"]})
    write_index(tmp_path, [(names[0], ["vector", "matrix"]), (names[1], ["experts"])], 41, 92)
    return tmp_path


def change_index(folder, weight_map):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = weight_map(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_the_headers_of_one_file_are_read(tmp_path):
    write_file(tmp_path / SINGLE, TENSORS)
    tensors = TensorFolder(tmp_path).tensors
    assert {name: (stored.shape, stored.dtype) for name, stored in tensors.items()} == {
        "vector": ((5,), "F32"),
        "matrix": ((4, 3), "BF16"),
        "experts": ((4, 2, 3), "F16"),
    }
    assert {stored.file for stored in tensors.values()} == {tmp_path / SINGLE}


def test_rows_are_float32_with_all_other_dimensions_flattened(numbered):
    folder = TensorFolder(numbered)
    assert folder.tensors.keys() == TENSORS.keys()
    assert folder.read_rows("vector", 1, 3).tolist() == [1.0, 2.0]
    for name in ("matrix", "experts"):
        got = folder.read_rows(name, 1, 3)
        assert got.dtype == torch.float32
        assert torch.equal(got, TENSORS[name][1:3].flatten(1).float())


def test_the_index_has_the_file_of_every_tensor_and_totals(numbered):
    first, second = file_names(2)
    assert read_json(numbered / INDEX) == {
        "metadata": {"total_parameters": 41, "total_size": 92},
        "weight_map": {"vector": first, "matrix": first, "experts": second},
    }


def test_a_file_of_the_index_that_is_missing_is_named(numbered):
    (numbered / file_names(2)[1]).unlink()
    with pytest.raises(UserError, match=f"{file_names(2)[1]}, listed in {INDEX}, is missing"):
        _ = TensorFolder(numbered).tensors


def test_a_file_outside_the_folder_is_not_read(numbered):
    write_file(numbered.parent / "outside.safetensors", {"experts": TENSORS["experts"]})
    change_index(numbered, lambda places: places | {"experts": "../outside.safetensors"})
    with pytest.raises(UserError, match="is missing"):
        _ = TensorFolder(numbered).tensors


def test_an_index_without_a_tensor_of_its_files_is_refused(numbered):
    change_index(numbered, lambda places: {name: places[name] for name in ("vector", "experts")})
    with pytest.raises(UserError, match=f"has matrix, but {INDEX} lists it in no file"):
        _ = TensorFolder(numbered).tensors


def test_an_index_with_tensors_that_no_file_has_is_refused(numbered):
    first = file_names(2)[0]
    change_index(numbered, lambda places: places | {"other": first})
    with pytest.raises(UserError, match=f"lists tensors that its files do not have: other \\(in {first}\\)"):
        _ = TensorFolder(numbered).tensors


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match="has no weight_map"):
        _ = TensorFolder(tmp_path).tensors


def test_a_truncated_file_is_named(numbered):
    file = numbered / file_names(2)[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{file} cannot be read: .*\. It may be truncated: download it again"):
        _ = TensorFolder(numbered).tensors


def test_a_folder_without_safetensors_is_refused_and_its_pickle_is_not_read(tmp_path):
    with pytest.raises(UserError, match=rf"has neither {SINGLE} nor {INDEX}\. Save the model as safetensors"):
        _ = TensorFolder(tmp_path).tensors
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which can run code, and is not read"):
        _ = TensorFolder(tmp_path).tensors


def test_json_objects_are_written_and_read_back(tmp_path):
    write_json(tmp_path / CONFIG, {"b": [1, None], "a": "ä"})
    assert read_json(tmp_path / CONFIG) == {"a": "ä", "b": [1, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: .*No such file"),
        (b"{", "cannot be read: "),
        (b"\xff", "cannot be read"),
        (b"[1]", "is not a JSON object"),
    ],
)
def test_what_is_not_a_json_object_is_refused(tmp_path, content, message):
    file = tmp_path / CONFIG
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file} {message}"):
        read_json(file)


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        ({}, 10, []),
        ({"a": 4, "b": 6, "c": 1}, 10, [["a", "b"], ["c"]]),
        ({"a": 4, "b": 7, "c": 3}, 10, [["a"], ["b", "c"]]),
        ({"a": 4, "b": 20, "c": 3}, 10, [["a"], ["b"], ["c"]]),
    ],
)
def test_tensors_are_grouped_in_order_up_to_a_limit(sizes, limit, groups):
    assert group_by_size(sizes, limit) == groups


def test_one_file_has_a_name_without_a_number():
    assert file_names(1) == ["model.safetensors"]
    assert file_names(12)[::11] == ["model-00001-of-00012.safetensors", "model-00012-of-00012.safetensors"]


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"a\.safetensors"):
        write_file(tmp_path / "missing" / "a.safetensors", {"vector": TENSORS["vector"]})
