"""Tables of the GPU benchmark's results: `benchmarks/gpu/README.md`, from the files beside it.

python -m benchmarks.gpu_table add FILE    # copy results to benchmarks/gpu/<date>-<chip>.jsonl, and write the tables
python -m benchmarks.gpu_table             # write the tables
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("gpu")
TITLE = """# Results on GPUs

Written by `python -m benchmarks.gpu_table`; docs/gpu.md says how results come here. "forward ms" and "both ms" (forward
and backward) are times on the device with the call queued behind others, and fla's are beside them; "of copying" is the
share of it that the least traffic takes at the copy rate; "alone" is the time of a call with nothing in the queue, and
"host" until the call returns. Files without queued times show those of a call alone.
"""
EMPTY = "\nNot measured on a GPU.\n"
Rows = list[dict[str, Any]]


def read(file: Path) -> Rows:
    """Read a results file, if it is there; a last line that was cut off is dropped."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def place(header: dict[str, Any], folder: Path) -> Path:
    """Return the file of a run, `<date>-<chip>.jsonl`, with the part unless it is the first one.

    Further runs of a part on a day are numbered from 2 on.
    """
    chip = re.sub(r"[^a-z0-9]+", "-", str(header["chip"]).lower()).strip("-")
    part = "" if header["header"] == "first" else f"-{header['header']}"
    stem = f"{header['date'][:10]}-{chip}{part}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(file for file in (folder / f"{name}.jsonl" for name in names) if _date(file) in (None, header["date"]))


def _date(file: Path) -> str | None:
    """Return the time of a kept run, None where there is none."""
    return next((str(row["date"]) for row in read(file) if "date" in row), None)


def add(source: Path, folder: Path = FOLDER) -> Path:
    """Copy the results of a run into the folder; return the file. Raises ValueError for a rehearsal."""
    rows = read(source)
    header = rows[0]
    chip = header["chip"] or next((row.get("chip") for row in rows if row.get("step") == "system"), None)
    if header["rehearsal"] or chip is None:
        raise ValueError(f"{source} holds a rehearsal, or no GPU answered: there is nothing to keep")
    rows[0] = header | {"chip": chip}
    folder.mkdir(exist_ok=True)
    file = place(rows[0], folder)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def render(files: Iterable[Path]) -> str:
    """Return the page of all runs, the latest first."""
    runs = [_run(file.name, read(file)) for file in sorted(files, key=lambda file: str(_date(file)), reverse=True)]
    return TITLE + ("".join(runs) or EMPTY)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _run(name: str, rows: Rows) -> str:
    header, steps = rows[0], [row for row in rows if "step" in row]
    system: dict[str, Any] = next((row for row in steps if row["step"] == "system"), {})
    versions = ", ".join(f"{package} {version}" for package, version in header["versions"].items() if version)
    text = f"\n## {header['chip']}, {header['date'][:16].replace('T', ' ')} UTC\n\n"
    text += f"[{name}]({name}): part `{header['header']}`, commit {header['commit'] or 'unknown'} "
    text += f"(sources {header['sources']}); driver {header['driver']}, {versions}.\n"
    rates = ((1e12, "TB/s copied", "copy_bytes_per_second"), (1e12, "TFLOP/s bf16", "bf16_flops_per_second"))
    found = [f"{system[key] / unit:.3g} {what}" for unit, what, key in rates if key in system]
    text += f"Measured in the same run: {', '.join(found)}.\n" if found else ""
    text += _times(steps, system) + _training(steps) + _checks(steps) + _bad(steps)
    return text


def _times(steps: Rows, system: dict[str, Any]) -> str:
    """Tabulate times, ours with the share of the copy rate that the least traffic would take, and fla's beside."""
    peers = {row["step"].removeprefix("peer/"): row for row in steps if row["step"].startswith("peer/")}
    rate = system.get("copy_bytes_per_second")
    lines = []
    for row in steps:
        part, _, case = row["step"].partition("/")
        if part not in ("time", "tuned") or "forward" not in row:
            continue
        cells = [f"{case}{' (tuned)' if part == 'tuned' else ''}"]
        for which in ("forward", "both"):
            ours, theirs = row.get(which), peers.get(case, {}).get(which)
            least, took = row.get(f"{which}_bytes"), _device_ms(ours)
            share = 1e3 * least / rate / took if rate and least and took else None
            cells += [_shown(took), "" if share is None else f"{share:.0%}", _shown(ours and ours["ms"])]
            cells += [_shown(ours and ours["host_ms"]), _shown(_device_ms(theirs))]
        lines.append([*cells, f"{row.get('peak_mib', 0) / 1024:.3g}"])
    for row in steps:
        backends = row.get("backends", {}) if row["step"].startswith("time/") else {}
        for backend, times in backends.items():
            cells = [f"{row['step'].removeprefix('time/')}, {backend}"]
            for which in ("forward", "both"):
                took = times[which]
                cells += [_shown(_device_ms(took)), "", _shown(took["ms"]), _shown(took["host_ms"]), ""]
            lines.append([*cells, ""])
    head = ["kernel, T-H-d", "forward ms", "of copying", "alone", "host", "fla"]
    head += ["both ms", "of copying", "alone", "host", "fla", "peak GiB"]
    return _table(head, lines) if lines else ""


def _device_ms(times: dict[str, float] | None) -> float | None:
    """Return the time on the device with a full queue, that of a call alone for runs from before it was taken."""
    return None if times is None else times.get("device_ms", times["ms"])


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


def _training(steps: Rows) -> str:
    lines = []
    for row in steps:
        if row["step"].startswith("train/") and "step_seconds" in row:
            of = f"{row['utilisation']:.0%}" + (f", limited by {row['limited_by']}" if "limited_by" in row else "")
            seconds, rate = f"{row['step_seconds']:.3g}", f"{row['tokens_per_second']:,.0f}"
            lines.append([row["step"], str(row.get("tokens", "")), seconds, rate, of, f"{row['memory_gib']:.3g}"])
        if row["step"] == "generate" and row["status"] == "ok":
            first, rate = (
                f"{row['first_token_seconds']:.3g} to the first token",
                f"{row['tokens_per_second'] or 0:,.0f}",
            )
            lines.append(["generate", str(row["prompt"]), first, rate, "", ""])
    head = ["training", "tokens", "seconds per step", "tokens/s", "of the matmul rate", "peak GiB"]
    return _table(head, lines) if lines else ""


def _checks(steps: Rows) -> str:
    checks = [row for row in steps if row["step"].startswith(("check/", "pytest/"))]
    good = sum(row["status"] == "ok" for row in checks)
    return f"\nCorrectness: {good} of {len(checks)} checks at the timed sizes passed.\n" if checks else ""


def _bad(steps: Rows) -> str:
    """List what did not end well."""
    bad = [row for row in steps if row["status"] != "ok"]
    lines = [f"- `{row['step']}`: {row['status']}: {row.get('error') or row.get('reason')}\n" for row in bad]
    return "\n" + "".join(lines) if lines else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Add results, if given, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("add").add_argument("source", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.command == "add":
        print(add(chosen.source))
    (FOLDER / "README.md").write_text(render(FOLDER.glob("*.jsonl")), encoding="utf-8")


if __name__ == "__main__":
    main()
