"""Write .ci/requirements/*.txt: what `make` installs, with the hashes of all builds of each version (`make lock`).

    python .ci/lock.py

uv resolves the ranges of pyproject.toml within constraints.txt, for all systems of `[tool.uv] environments` at once.
pip prefers a CPU build of torch, where it is given one, to that of the public index: their hashes are added.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".ci" / "requirements"
ADAPTERS = ("megatron", "deepspeed", "huggingface", "test-s3", "test-kubernetes", "wandb", "mlflow")
CUDA = ("nvidia-", "cuda-")
"""How the names of the libraries begin that torch's CUDA build requires, and its CPU build does not."""
BUILDS = tuple(product(("3.11", "3.12", "3.13", "3.14"), ("x86_64", "aarch64")))
"""The Pythons and machines whose CPU builds of torch are looked for."""
HEAD = "# Written by `make lock` from pyproject.toml and constraints.txt.\n"


def compile_lock(known: str, *extras: str) -> dict[str, str]:
    """Return the lines of each package that longctx needs with these extras, in alphabetical order of their names.

    `known` are lines of an earlier lock, whose versions stay where constraints.txt leaves a choice.
    """
    # With these, uv takes torch only from them, without the builds of the public index.
    more = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
    environment = {name: value for name, value in os.environ.items() if name not in more}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "lock.txt")
        output.write_text(known, encoding="utf-8")
        wanted = [option for extra in extras for option in ("--extra", extra)]
        form = ["--universal", "--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
        command = ["uv", "pip", "compile", "pyproject.toml", *wanted, "-c", "constraints.txt", *form, "-o", str(output)]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=True)
        return parse(output.read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, str]:
    """Return the lines of each package of a lock, by its name."""
    entries = re.findall(r"^([\w.-]+)(==.*\n(?: .*\n)*)", text, re.MULTILINE)
    return {name: name + rest for name, rest in entries}


def cpu_hashes(version: str) -> set[str]:
    """Return the hashes of the CPU builds of torch that pip finds in the indexes and folders it is configured with."""
    found = set()
    for python, machine in BUILDS:
        target = ["--target", "none", "--python-version", python, "--platform", f"manylinux_2_28_{machine}"]
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--report", "-", *target]
        command = [sys.executable, "-m", "pip", "--quiet", "install", *options, f"torch=={version}+cpu"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
        items = json.loads(answer)["install"] if answer else []
        found |= {item["download_info"]["archive_info"]["hashes"]["sha256"] for item in items}
    return found


def version_of(entry: str) -> str:
    """Return the version of a package's lines."""
    return entry.partition("==")[2].split()[0]


def with_hashes(entry: str, hashes: set[str]) -> str:
    """Return a package's lines with these hashes added."""
    head = entry.partition(" \\\n")[0]
    listed = sorted(hashes | set(re.findall(r"sha256:(\w+)", entry)))
    return " \\\n    ".join([head, *(f"--hash=sha256:{value}" for value in listed)]) + "\n"


def main() -> None:
    """Write the files anew; versions that constraints.txt leaves open stay."""
    known = "".join(file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.txt")))
    dev = compile_lock(known, "dev")
    entries = compile_lock(known, "dev", *ADAPTERS)

    torch, old = entries["torch"], parse(known).get("torch", "torch==none")
    builds = cpu_hashes(version_of(torch))
    # A build that is not to be had here may be elsewhere, and the hashes of a version do not change.
    builds |= set(re.findall(r"sha256:(\w+)", old)) if version_of(old) == version_of(torch) else set()
    entries["torch"] = with_hashes(torch, builds)

    # What torch needs, all need: without the marker, Python and system that have no torch are told so by pip.
    common = torch.partition("==")[2].partition(version_of(torch))[2].partition(" \\")[0]
    FOLDER.mkdir(exist_ok=True)
    for file, chosen in {
        "dev.txt": [name for name in entries if name in dev and not name.startswith(CUDA)],
        "cuda.txt": [name for name in entries if name.startswith(CUDA)],
        "adapters.txt": [name for name in entries if name not in dev],
    }.items():
        lines = "".join(entries[name] for name in chosen)
        (FOLDER / file).write_text(HEAD + lines.replace(f"{common} \\", " \\"), encoding="utf-8")


if __name__ == "__main__":
    main()
