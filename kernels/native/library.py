"""Building and loading of native kernels: one C++ file per family of operators, with a C interface.

A file is compiled for the CPU of this machine when it is first needed, in about ten seconds, and kept in
`$XDG_CACHE_HOME/longctx/native` under a name that has everything the result depends on: sources, compiler, flags, CPU.
Processes that need it at once build it once. Without a compiler, and with LONGCTX_NATIVE=0, the torch operators run.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

SWITCH = "LONGCTX_NATIVE"
"""Environment variable: 0 turns native kernels off."""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
SOURCES = Path(__file__).parent
FAMILIES = ("additive", "additive_vector", "attention", "convolution", "delta", "pointwise")
"""The C++ files."""
_COMPILERS = ("c++", "g++", "clang++")
_log = logging.getLogger("longctx")


class NativeUnavailableError(RuntimeError):
    """There is no native kernel on this machine; the message says why."""


def is_enabled() -> bool:
    """Return whether native kernels are used where they can be built."""
    return os.environ.get(SWITCH, "1") != "0"


@cache
def load(family: str) -> ctypes.CDLL | None:
    """Load the kernels of `<family>.cpp`, built if need be; None, with one line in the log, if that cannot be done."""
    try:
        return ctypes.CDLL(str(build(family)))
    except (NativeUnavailableError, OSError) as error:
        _log.warning(
            "native CPU kernels (%s) are not available: %s. torch operators run in their place and take two to nine "
            "times as long; %s=0 silences this",
            family,
            error,
            SWITCH,
        )
        return None


def is_available(family: str) -> bool:
    """Return whether a family's kernels are used, built if need be."""
    return is_enabled() and load(family) is not None


def loaded() -> list[str]:
    """Return the families whose kernels are used, built if need be."""
    return [family for family in FAMILIES if is_available(family)]


def describe() -> str:
    """Return a line about the C++ kernels of this machine: those in use and their compiler, or why there are none."""
    if not is_enabled():
        return f"torch operators: {SWITCH}=0 turns the C++ kernels off"
    families = loaded()
    missing = [family for family in FAMILIES if family not in families]
    if not missing:
        return f"C++ kernels ({', '.join(families)}), {_compiler_name()}"
    reason = _why_not(missing[0])
    if not families:
        return f"torch operators: {reason}"
    return (
        f"C++ kernels ({', '.join(families)}), {_compiler_name()}; torch operators for {', '.join(missing)}: {reason}"
    )


def _compiler_name() -> str:
    """Return the first line of what the compiler says of its version."""
    compiler = find_compiler()
    return next(iter(_version(compiler).splitlines()), compiler)


def _why_not(family: str) -> str:
    """Return why a family cannot be loaded."""
    try:
        ctypes.CDLL(str(build(family)))
    except (NativeUnavailableError, OSError) as error:
        return str(error)
    return "they could not be built when this process first asked for them"


def call(family: str, function: str, arguments: ctypes.Structure) -> None:
    """Call `<family>_<function>` with a pointer to its arguments. Raises MemoryError where it found no memory."""
    found = load(family)
    assert found is not None
    if getattr(found, f"{family}_{function}")(ctypes.byref(arguments)):
        raise MemoryError(f"{family}_{function} found no memory for its scratch buffers")


def build(family: str) -> Path:
    """Return the library of `<family>.cpp`, compiled unless it has been.

    Raises NativeUnavailableError if there is no compiler, or it fails.
    """
    compiler = find_compiler()
    source = SOURCES / f"{family}.cpp"
    name = f"{family}-{_digest(compiler, source)}{sysconfig.get_config_var('SHLIB_SUFFIX')}"
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / name).is_file():
                _compile(compiler, source, folder / name)
    except OSError as error:
        raise NativeUnavailableError(f"{folder} cannot be used: {error}") from error
    return folder / name


def cache_folder() -> Path:
    """Return the folder of built libraries, this user's."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longctx" / "native"


def find_compiler() -> str:
    """Return the path of the C++ compiler: that of the environment variable CXX, or the system's.

    Raises NativeUnavailableError if there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NativeUnavailableError(f"no C++ compiler was found ({', '.join(names)}): install g++ or clang++, or set CXX")


def _compile(compiler: str, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder, target.name)
        result = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(draft)], capture_output=True, text=True, errors="replace"
        )
        if result.returncode:
            said = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:200])
            raise NativeUnavailableError(f"{compiler} failed: {said}")
        draft.rename(target)


def _digest(compiler: str, source: Path) -> str:
    """Return a digest of all that a library depends on."""
    parts = [compiler, *FLAGS, _version(compiler), platform.machine(), _cpu_features()]
    parts += [path.read_text(encoding="utf-8") for path in (source, *sorted(SOURCES.glob("*.h")))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def _version(compiler: str) -> str:
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return answer.stdout


@cache
def _cpu_features() -> str:
    """Return what decides on the instructions of `-march=native`: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.split("\t")[0].strip() in wanted))
