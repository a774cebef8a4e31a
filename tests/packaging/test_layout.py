"""The layout of the tests: a test file per module, under the module's name in the module's folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "parallel", "moe", "longctx", "launch")
WITHOUT = {
    "kernels/linear/additive/triton_*.py": "kernels of triton.py: tests/kernels/linear/additive/test_triton.py",
    "kernels/linear/delta/triton_*.py": "kernels of triton.py: tests/kernels/linear/delta/test_triton.py",
    "kernels/linear/triton_*.py": "parts of both: the same, test_segment_scan.py and ../test_triton_compile.py",
    "kernels/native/tensor.py": "of calls: tests/kernels/linear/test_native_call.py, ../attention/test_native.py",
    "launch/bench_rank.py": "the rank of bench_parallel.py: tests/launch/test_bench_parallel.py",
    "launch/commands/*.py": "arguments of commands: tests/launch/test_main.py",
    "launch/job_rank.py": "a rank of a job, which trains: tests/launch/test_train.py",
    "launch/rank.py": "the process that local.py starts: tests/launch/test_local.py",
    "longctx/__main__.py": "one call: tests/launch/test_main.py starts it",
    "longctx/adapters/*/*.py": "tested where they run, inside the frameworks, by topic: tests/adapters/<framework>",
    "longctx/bench/layers.py": "measured over ranks: tests/launch/test_bench_parallel.py",
    "longctx/checkpoint/trainer_state.py": "read with a checkpoint: tests/checkpoint/test_read.py",
    "longctx/convert/megatron_table.py": "names of tensors both ways: tests/convert/test_megatron.py",
    "longctx/train/reporter.py": "what a run prints and writes: tests/train/test_{trainer,display,plots,recovery}.py",
    "longctx/engines/base.py": "a protocol and its records: tests/engines/test_torch_engine.py",
    "longctx/tracking/base.py": "a protocol and its records: tests/tracking/test_trackers.py",
    "longctx/verify/equations/constant_decay.py": "of mixers: tests/mixers/test_{linear,lightning,retention}.py",
    "longctx/verify/equations/delta.py": "of mixers: tests/mixers/test_deltanet.py",
    "longctx/verify/equations/gated.py": "of mixers: tests/mixers/test_{simple_gla,gla,hgrn2,lightnet,mamba2}.py",
    "longctx/verify/equations/softmax.py": "of mixers: tests/mixers/test_{softmax,attention_experts}.py",
}
"""Modules, as globs, without a test file under their name, and where they are tested."""


def modules() -> list[Path]:
    """The files that hold code, from the root."""
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    return [file.relative_to(ROOT) for file in files if file.name != "__init__.py"]


def place_of_tests(module: Path) -> Path:
    """The place of a module's test file; `longctx/` itself has no folder in `tests/`."""
    folders = module.parent.parts[module.parts[0] == "longctx" :]
    return Path("tests", *folders, f"test_{module.name}")


def test_every_module_has_a_test_file_under_its_name_or_a_reason() -> None:
    missing = [str(module) for module in modules() if not (ROOT / place_of_tests(module)).exists()]
    unexplained = [module for module in missing if not any(Path(module).match(glob) for glob in WITHOUT)]
    assert not unexplained, "add tests under these modules' names, or a line to WITHOUT"


def test_every_reason_is_that_of_a_module_without_a_test_file() -> None:
    missing = [module for module in modules() if not (ROOT / place_of_tests(module)).exists()]
    stale = [glob for glob in WITHOUT if not any(module.match(glob) for module in missing)]
    assert not stale, "these lines of WITHOUT say nothing any more"


def test_folders_of_tests_mirror_those_of_modules() -> None:
    names = ("adapters", "benchmarks", "compare", "e2e", "faults", "packaging", "recipes")
    own = {f"tests/{name}" for name in names} | {"tests"}
    mirrored = {str(place_of_tests(module).parent) for module in modules()}
    folders = {str(file.parent.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= own | mirrored, "these have no folder of modules"
