"""Internals of other packages are as longctx uses them, and each that the code uses is checked: an upgrade that changes
one fails here, with the name of the internal, the files that use it and what for.
"""

import ast
from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.adapters.internals import FRAMEWORKS
from tests.packaging.internals import (
    Canary,
    Source,
    begins,
    covers,
    each,
    exists,
    files_of,
    find_uses,
    has,
    holds,
    needs_nothing,
    read_sources,
    takes,
)
from tests.packaging.test_packages import EXTRAS, PYPROJECT

CHECKPOINT = "torch.distributed.checkpoint"
ATEN = "torch.ops.aten._scaled_dot_product"


@cache
def uses_of_longctx() -> dict[str, list[str]]:
    """The files that use each internal: found when a test asks, since every worker of pytest imports this module."""
    return find_uses(read_sources())


def fails_where_false(assert_async: Any) -> None:
    assert_async(torch.tensor(True), "fits")
    with pytest.raises(RuntimeError, match="too large"):
        assert_async(torch.tensor(False), "too large")


def marks_constants(assume_constant_result: Any) -> None:
    def function() -> None:
        pass

    assert vars(assume_constant_result(function)) == {"_dynamo_marked_constant": True}


def gives_one_norm_each(foreach_norm: Any) -> None:
    first, second = foreach_norm([torch.tensor([3.0, 4.0]), torch.tensor([[2.0]])])
    assert (float(first), float(second)) == (5.0, 2.0)


def is_the_type_of_fake_tensors(fake_tensor: Any) -> None:
    with FakeTensorMode():
        assert isinstance(torch.empty(2), fake_tensor)
    assert not isinstance(torch.empty(2), fake_tensor)


def is_a_number(limit: Any) -> None:
    assert isinstance(limit, int)


def operator(arguments: str) -> Callable[[Any], None]:
    """An operator of torch has these arguments, in this order; after `*`, by name."""

    def check(found: Any) -> None:
        listed = found.default._schema.arguments
        by_position = [argument.name for argument in listed if not argument.kwarg_only]
        by_name = [argument.name for argument in listed if argument.kwarg_only]
        assert " ".join([*by_position, "*", *by_name]) == arguments, found.default._schema

    return check


def casts_parameters(apply: Any) -> None:
    layer = nn.Linear(2, 2)
    apply(layer, lambda x: x.to(torch.bfloat16))
    assert layer.weight.dtype == torch.bfloat16


def small_module() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("derived", torch.zeros(1), persistent=False)
    return module


def names_buffers_that_are_not_saved(_: Any) -> None:
    assert small_module()._non_persistent_buffers_set == {"derived"}


def has_the_parameters_that_forward_sees(_: Any) -> None:
    module = small_module()
    assert module._parameters["weight"] is module.weight


def has_the_buffers_that_forward_sees(_: Any) -> None:
    module, other = small_module(), torch.ones(1)
    module._buffers["kept"] = other
    assert module.kept is other
    assert dict(module.named_buffers())["kept"] is other


def keeps_failures(exception: Any) -> None:
    error = OSError("full")
    assert exception("", {1: (error, None)}).failures[1][0] is error


def is_an_error(found: Any) -> None:
    assert issubclass(found, Exception)


def counts_flops(register: Any) -> None:
    begins("targets")(register)
    assert torch.ops.aten.mm in torch.utils.flop_counter.flop_registry


CANARIES = {
    "torch._assert_async": Canary("refuse wrong gates on CUDA without waiting for it", fails_where_false),
    "torch._foreach_norm": Canary("compute the norms of all gradients in one call", gives_one_norm_each),
    "torch.compiler.assume_constant_result._dynamo_marked_constant": Canary(
        "compile what asks whether native kernels are built", marks_constants, of_objects=True
    ),
    "torch._dynamo.config.recompile_limit": Canary("compile a kernel for each width and dtype", is_a_number),
    "torch._dynamo.maybe_mark_dynamic": Canary("compile once for all numbers of rows", begins("t", "index")),
    "torch._subclasses.fake_tensor.FakeTensor": Canary(
        "skip checks of values under tracing", is_the_type_of_fake_tensors
    ),
    "torch.nn.Module._apply": Canary(
        "keep decays in float32 when a model is cast", each(begins("fn", "recurse"), casts_parameters)
    ),
    "torch.nn.Module._non_persistent_buffers_set": Canary(
        "shard a buffer as what it was", names_buffers_that_are_not_saved, of_objects=True
    ),
    "torch.nn.Module._parameters": Canary(
        "find a parameter behind its float32 copy", has_the_parameters_that_forward_sees, of_objects=True
    ),
    "torch.nn.Module._buffers": Canary(
        "share buffers between virtual ranks", has_the_buffers_that_forward_sees, of_objects=True
    ),
    "torch.distributed.tensor.debug._clear_sharding_prop_cache": Canary(
        "forget meshes whose process groups are gone", needs_nothing
    ),
    "torch.distributed.elastic.multiprocessing.errors.get_error_handler": Canary(
        "pass the first traceback to torchrun", lambda found: has("initialize", "record_exception")(found())
    ),
    "torch.utils.flop_counter.flop_registry": Canary("count the operations of attention once", exists),
    "torch.utils.flop_counter.register_flop_formula": Canary("count the operations of its operators", counts_flops),
    "torch.utils.flop_counter.sdpa_flop_count": Canary(
        "count the operations of attention", begins("query_shape", "key_shape", "value_shape")
    ),
    "torch.utils.flop_counter.sdpa_backward_flop_count": Canary(
        "count the operations of attention", begins("grad_out_shape", "query_shape", "key_shape", "value_shape")
    ),
    f"{ATEN}_flash_attention_for_cpu": Canary(
        "compute attention on CPUs with its lse",
        operator("query key value dropout_p is_causal * attn_mask scale"),
    ),
    f"{ATEN}_flash_attention_for_cpu_backward": Canary(
        "differentiate attention by the global out and lse",
        operator("grad_out query key value out logsumexp dropout_p is_causal * attn_mask scale"),
    ),
    f"{ATEN}_flash_attention": Canary(
        "compute attention on CUDA with its lse",
        operator("query key value dropout_p is_causal return_debug_mask * scale"),
    ),
    f"{ATEN}_flash_attention_backward": Canary(
        "differentiate attention by the global out and lse",
        operator(
            "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed "
            "philox_offset * scale"
        ),
    ),
    f"{ATEN}_cudnn_attention": Canary(
        "compute attention with cuDNN and its lse",
        operator("query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask * scale"),
    ),
    f"{ATEN}_cudnn_attention_backward": Canary(
        "differentiate attention by the global out and lse",
        operator(
            "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q "
            "max_k dropout_p is_causal * scale"
        ),
    ),
    f"{CHECKPOINT}.save": Canary("write checkpoints", takes("storage_writer", "planner", "process_group", "no_dist")),
    f"{CHECKPOINT}.load": Canary("read checkpoints", takes("storage_reader", "planner", "no_dist")),
    f"{CHECKPOINT}.FileSystemReader": Canary(
        "read files without running what they name", each(begins("path"), has("read_metadata", "read_data"))
    ),
    f"{CHECKPOINT}.FileSystemWriter": Canary(
        "report a full disk", each(takes("path", "single_file_per_rank"), has("write_data"))
    ),
    f"{CHECKPOINT}.api.CheckpointException": Canary("report the errors of all ranks", keeps_failures),
    f"{CHECKPOINT}.default_planner.DefaultLoadPlanner": Canary(
        "unpickle entries with restrictions",
        each(has("create_local_plan", "lookup_tensor"), lambda found: begins("read_item", "value")(found.load_bytes)),
    ),
    f"{CHECKPOINT}.default_planner.DefaultSavePlanner": Canary(
        "write tensors as they are made",
        each(
            takes("flatten_state_dict"),
            has("create_local_plan"),
            lambda found: begins("index")(found.lookup_object),
        ),
    ),
    f"{CHECKPOINT}.filesystem._StorageInfo": Canary(
        "refuse files outside of a checkpoint", begins("relative_path", "offset", "length")
    ),
    f"{CHECKPOINT}.metadata.BytesStorageMetadata": Canary("find the entries that are not tensors", exists),
    f"{CHECKPOINT}.metadata.ChunkStorageMetadata": Canary("read regions of tensors", holds("offsets", "sizes")),
    f"{CHECKPOINT}.metadata.Metadata": Canary(
        "list what a checkpoint holds", holds("state_dict_metadata", "storage_data", "storage_meta")
    ),
    f"{CHECKPOINT}.metadata.MetadataIndex": Canary("name the parts of tensors", begins("fqn", "offset")),
    f"{CHECKPOINT}.metadata.StorageMeta": Canary("read a folder's metadata once", holds("load_id")),
    f"{CHECKPOINT}.metadata.TensorStorageMetadata": Canary(
        "know the shapes and dtypes of stored tensors", holds("properties", "size", "chunks")
    ),
    f"{CHECKPOINT}.planner.LoadPlan": Canary("read regions of tensors", begins("items")),
    f"{CHECKPOINT}.planner.ReadItem": Canary("name an entry that is refused", holds("dest_index")),
    f"{CHECKPOINT}.planner.SavePlan": Canary("write a shard per piece of a tensor", holds("items")),
    f"{CHECKPOINT}.planner.SavePlanner": Canary("report a full disk", exists),
    f"{CHECKPOINT}.planner.WriteItem": Canary(
        "write a shard per piece of a tensor", holds("index", "type", "tensor_data")
    ),
    f"{CHECKPOINT}.planner.WriteItemType": Canary("write a shard per piece of a tensor", has("SHARD")),
    f"{CHECKPOINT}.planner_helpers.create_read_items_for_chunk_list": Canary(
        "read regions of tensors", begins("fqn", "checkpoint_md", "local_chunks")
    ),
    f"{CHECKPOINT}.staging.DefaultStager": Canary("copy the state before it changes", has("stage", "close")),
    f"{CHECKPOINT}.staging.StagingOptions": Canary(
        "copy the state without pinned or shared memory",
        begins("use_pinned_memory", "use_shared_memory", "use_async_staging", "use_non_blocking_copy"),
    ),
    f"{CHECKPOINT}.state_dict.get_model_state_dict": Canary("name parameters under FSDP", begins("model")),
    f"{CHECKPOINT}.state_dict.get_state_dict": Canary("save model and optimizer", begins("model", "optimizers")),
    f"{CHECKPOINT}.state_dict.set_state_dict": Canary(
        "resume model and optimizer", takes("model_state_dict", "optim_state_dict")
    ),
    f"{CHECKPOINT}.storage.WriteResult": Canary("report a full disk", exists),
    "triton.errors.TritonError": Canary("skip tile sizes that do not compile", is_an_error),
    "triton.knobs.runtime.interpret": Canary("know whether kernels run in the interpreter", bool),
}


@pytest.mark.parametrize("name", CANARIES)
def test_an_internal_is_as_it_is_used(name: str) -> None:
    CANARIES[name].run(name, files_of(name, uses_of_longctx()))


def test_every_internal_has_a_canary() -> None:
    canaries = [*CANARIES, *FRAMEWORKS]
    uses = uses_of_longctx().items()
    unwatched = {use: files for use, files in uses if not any(covers(canary, use) for canary in canaries)}
    assert unwatched == {}, "add canaries here or, for optional frameworks, in tests/adapters/internals.py"


def test_every_canary_is_of_an_internal_that_is_used() -> None:
    assert [name for name in (*CANARIES, *FRAMEWORKS) if not files_of(name, uses_of_longctx())] == []


def test_what_has_internals_has_an_upper_bound() -> None:
    """Of flash_attn, which nothing here installs, `longctx.kernels.attention.backends` checks the version."""
    names = {"megatron": "megatron-core"}
    used = {canary.partition(".")[0] for canary in (*CANARIES, *FRAMEWORKS)} - {"flash_attn"}
    bounded = {names.get(name, name) for name in used} | {"flash-linear-attention"}
    wanted = [*PYPROJECT["project"]["dependencies"], *chain.from_iterable(EXTRAS.values())]
    requirements = [Requirement(line) for line in wanted if Requirement(line).name in bounded]
    assert {requirement.name for requirement in requirements} == bounded
    for requirement in requirements:
        assert any(each.operator in ("<", "<=", "~=", "==") for each in requirement.specifier), requirement


def test_a_changed_internal_is_named_with_its_use() -> None:
    gone = Canary("compute norms", exists)
    with pytest.raises(pytest.fail.Exception, match=r"torch\._no_such is not what a\.py, b\.py needs to compute norms"):
        gone.run("torch._no_such", ["a.py", "b.py"])
    changed = Canary("compute norms", takes("order"))
    with pytest.raises(pytest.fail.Exception, match=r"to compute norms: .*no parameters order"):
        changed.run("torch.nn.Linear", ["a.py"])


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ("from torch._subclasses import FakeTensor", {"torch._subclasses.FakeTensor"}),
        ("import torch\ntorch._foreach_norm([])", {"torch._foreach_norm"}),
        ("import torch.distributed.checkpoint as dcp\ndcp.save()", {"torch.distributed.checkpoint.save"}),
        ("from megatron.core import parallel_state as p\np.get()", {"megatron.core.parallel_state.get"}),
        ("def late():\n    import deepspeed.ops\n    deepspeed.ops.x", {"deepspeed.ops.x"}),
        ("def f(module):\n    return module._hooks", {"_hooks"}),
        ("def f(module):\n    module._hooks = 1", {"_hooks"}),
        ("def f(module):\n    return getattr(module, '_hooks', None)", {"_hooks"}),
        ("class A(B):\n    def _apply(self): super()._apply()", {"_apply"}),
        ("class A:\n    def __init__(self): self._buffers = 1\ndef f(module): return module._buffers", {"_buffers"}),
        ("class A:\n    def __init__(self): self._buffers = 1\n    def f(self): self._buffers.get()", set()),
        ("class A:\n    def _own(self): pass\ndef f(a): a._own()", set()),
        ("import os\nos._exit(1)", set()),
        ("import torch\ntorch.zeros(1)", set()),
        ("from longctx.data import _own", set()),
    ],
)
def test_uses_are_found(text: str, uses: set[str]) -> None:
    found = find_uses({"a.py": Source(ast.parse(text))})
    named = {use for use in found if not any(other.startswith(f"{use}.") for other in found)}
    assert named == uses
