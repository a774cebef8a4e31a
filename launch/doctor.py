"""`longctx doctor`: launches ranks that examine this machine, or joins a job as one of them; prints what they find."""

import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longctx.launch.arguments import check_json_file
from longctx.launch.job_environment import RankOfJob, counted, find_job
from longctx.launch.job_rank import refuse_nproc, run_as_rank
from longctx.launch.local import Limits, run_ranks
from longctx.launch.terminal import echo
from longctx.printable import printable

if TYPE_CHECKING:
    from longctx.doctor.examine import DoctorReport
    from longctx.doctor.findings import Finding

WIDTH = 132
"""Columns of the table, whatever the width of the terminal: a truncated table is unreadable."""
ENTRY = "longctx.launch.doctor:run_rank"
_STATUS = "status"
_STOP_SECONDS = 10.0
_STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def doctor(*, nproc: int | None, out: Path, timeout: float, json_file: Path | None) -> int:
    """Examine this machine, or those of this process's job; return the exit status, 1 if something is wrong.

    In a job whose scheduler has started this process as a rank, it joins as that rank. Otherwise `nproc` ranks are
    launched on this machine, which may be one node of a job; None: one per GPU, or 2 on a CPU. `out`: the run directory
    whose disk is measured. `timeout`: seconds per collective. `json_file`: where rank 0 writes the hardware profile.
    """
    job = find_job(nproc)
    if isinstance(job, RankOfJob):
        refuse_nproc(nproc, job)
        if job.rank == 0:
            check_json_file(json_file)
        logs = out / "logs"
        return run_as_rank(job, partial(_examine, out, timeout, json_file, logs), "")
    check_json_file(json_file)
    ranks = nproc or (job and job.ranks) or _default_ranks()
    node = job if job is not None and job.nodes > 1 else None
    logs = Path(tempfile.mkdtemp(prefix="longctx-doctor-"))
    arguments = {
        "out": str(out.absolute()),
        "timeout": timeout,
        "json_file": None if json_file is None else str(json_file.absolute()),
        "logs": str(logs),
    }
    status = run_ranks(
        ENTRY,
        arguments,
        ranks=ranks,
        logs=logs,
        node=node,
        title="examination",
        limits=Limits(save=_STOP_SECONDS),
        on_stop="stopping",
    )
    if status == 1:  # the last lines name files among the logs
        return status
    found = status or int((logs / _STATUS).read_text(encoding="ascii"))
    shutil.rmtree(logs)
    return found


def run_rank(out: str, timeout: float, json_file: str | None, logs: str) -> int:
    """Examine as a rank that the launcher has started, and leave it the exit status; return 128 + a signal's number."""
    try:
        status = _examine(Path(out), timeout, None if json_file is None else Path(json_file), Path(logs))
    except SystemExit as stop:
        return int(str(stop.code))
    if os.environ["LOCAL_RANK"] == "0":
        (Path(logs) / _STATUS).write_text(str(status), encoding="ascii")
    return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _examine(out: Path, timeout: float, json_file: Path | None, logs: Path) -> int:
    """Take part in the examination; return the exit status. SIGTERM ends it, after what was written is removed."""
    from longctx.doctor.examine import examine
    from longctx.doctor.findings import worst
    from longctx.hardware_profile import save_profile

    def finish(report: "DoctorReport") -> None:
        print_findings(report.findings, Console(highlight=False, width=WIDTH))
        if json_file is not None:
            save_profile(report.profile, json_file)
            echo(f"hardware profile: {json_file}")

    before = signal.signal(signal.SIGTERM, _stop)
    try:
        report = examine(out, timeout=timeout, stacks=logs, announce=lambda text: echo(f"{text} …"), finish=finish)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1 if worst(report.findings) == "wrong" else 0


def print_findings(findings: Sequence["Finding"], console: Console) -> None:
    """Print a table of all findings, then what to do about those that are not ok."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, wraps in (("check", False), ("found", True), ("status", False)):
        table.add_column(name, no_wrap=not wraps, overflow="fold")
    for finding in findings:
        value = f"{finding.value} [{finding.where}]" if finding.where else finding.value
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(Text(finding.name), Text(printable(value)), status)
    console.print(table)
    faults = [finding for finding in findings if finding.status != "ok"]
    for remedy in dict.fromkeys(finding.remedy for finding in faults):
        console.print()
        for finding in faults:
            if finding.remedy == remedy:
                where = f" on {finding.where}" if finding.where else ""
                head = Text(f"{finding.status}: ", style=_STYLES[finding.status])
                text = printable(f"{finding.name}{where}: {finding.value}")
                console.print(head.append(text, style="not bold default"), soft_wrap=True)
        console.print(Text(f"  {printable(remedy)}"), soft_wrap=True)
    wrong, warnings = (sum(one.status == status for one in findings) for status in ("wrong", "warning"))
    console.print(f"\n{counted(wrong, 'fault') if wrong else 'No fault'}, {counted(warnings, 'warning')}.")


def _default_ranks() -> int:
    import torch

    return (torch.cuda.device_count() if torch.cuda.is_available() else 0) or 2
