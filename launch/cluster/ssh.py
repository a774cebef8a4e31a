"""Hosts reached by ssh: one script per job, run on every host, and a supervisor here until all have ended.

Each host's script starts its ranks. It lives as long as its connection: when the input that ssh passes on is closed, as
when this process ends, the ranks save and stop.
"""

import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

from longctx.launch.cluster.job import FOLDER, RECIPE, ClusterJob, Submission, prologue
from longctx.launch.cluster.profile import SshProfile
from longctx.launch.terminal import echo, echo_error

SCRIPT = "node.sh"
_POLL = 0.1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SETTLE = 60.0
"""Time in seconds, beyond the recipe's parallel.timeout, in which the other hosts end after one failed."""
_LAST_LINES = 20


class Ssh:
    """Jobs on hosts that ssh reaches."""

    def __init__(self, profile: SshProfile) -> None:
        self._profile = profile

    def prepare(self, job: ClusterJob) -> Submission:
        """Return the script and the command of the first host: see Executor."""
        job.check_single("ssh")
        script = job.folder / SCRIPT
        files = {script: "\n".join(self._lines(job)) + "\n"} | job.recipe_files()
        return Submission(files, script, self._command(script, 0))

    def submit(self, job: ClusterJob, submission: Submission) -> int:
        """Run it to its end: see Executor."""
        logs = job.directory / job.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        commands = [self._command(submission.script, node) for node in range(job.nodes)]
        return supervise(commands, list(self._profile.hosts), logs, job.stop_seconds)

    def _command(self, script: Path, node: int) -> tuple[str, ...]:
        remote = f"bash {shlex.quote(str(script))} {node}"
        return ("ssh", "-o", "BatchMode=yes", *self._profile.options, self._profile.hosts[node], remote)

    def _lines(self, job: ClusterJob) -> list[str]:
        profile = self._profile
        address = profile.address or profile.hosts[0].rpartition("@")[2]
        run = shlex.quote(str(job.out))
        return [
            "#!/bin/bash",
            "# The ranks of one host: node.sh NODE",
            f"cd {shlex.quote(str(job.directory))} || exit 2",
            *prologue(profile),
            f'export PET_NNODES={job.nodes} PET_NODE_RANK="$1"',
            f"export PET_MASTER_ADDR={shlex.quote(address)} PET_MASTER_PORT={profile.port}",
            f"{job.command(profile, f'{run}/{FOLDER}/{RECIPE}', run)} --nproc {job.ranks} &",
            "ranks=$!",
            "",
            "# ssh closes this script's input when the connection ends: the ranks then save and stop.",
            "exec 3<&0",
            '{ cat <&3; kill -TERM "$ranks"; } > /dev/null 2>&1 &',
            'wait "$ranks"',
            "status=$?",
            "kill $! 2> /dev/null",
            "exit $status",
        ]


def supervise(commands: list[tuple[str, ...]], hosts: list[str], logs: Path, timeout: float) -> int:
    """Run one command per host until all have ended; return the exit status of the job.

    A signal is passed on by closing the commands' inputs. After a failure the others have `timeout` seconds and a
    minute to end by themselves. The first host's output is this process's, that of others is in `logs/node-N.log`.
    """
    signals: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    with ExitStack() as stack:
        for number in _STOP_SIGNALS:
            stack.callback(signal.signal, number, signal.getsignal(number))
            signal.signal(number, record)
        processes = []
        for node, command in enumerate(commands):
            log = None if node == 0 else stack.enter_context((logs / f"node-{node}.log").open("ab"))
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
            processes.append(process)
            stack.callback(process.kill)
        deadline, told, failed = float("inf"), 0, -1
        while None in [process.poll() for process in processes]:
            if failed < 0 and (ended := _failed(processes)):
                failed, deadline = ended[0], min(deadline, time.monotonic() + timeout + _SETTLE)
            if len(signals) > told:
                told = len(signals)
                echo(f"{signal.Signals(signals[0]).name}: saving and stopping on {len(hosts)} hosts")
                _close_inputs(processes)
                deadline = min(deadline, time.monotonic() + 2 * timeout)
            if time.monotonic() > deadline or signals.count(signal.SIGINT) > 1:
                for process in processes:
                    process.kill()
                deadline = float("inf")
            time.sleep(_POLL)
    return _conclude(processes, hosts, logs, failed)


def _failed(processes: list["subprocess.Popen[bytes]"]) -> list[int]:
    return [node for node, process in enumerate(processes) if process.returncode not in (None, 0)]


def _close_inputs(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        with suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.close()


def _conclude(processes: list["subprocess.Popen[bytes]"], hosts: list[str], logs: Path, failed: int) -> int:
    """Say which host failed first; return the status of the job."""
    statuses = [process.returncode for process in processes]
    failed = failed if failed >= 0 else next((node for node, status in enumerate(statuses) if status), 0)
    stopped = [status for status in statuses if status in (128 + signal.SIGINT, 128 + signal.SIGTERM)]
    if all(status == 0 for status in statuses):
        return 0
    if stopped and all(status == 0 or status in stopped for status in statuses):
        return stopped[0]
    log = logs / f"node-{failed}.log"
    if failed > 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        sys.stderr.write("".join(f"{hosts[failed]}: {line}\n" for line in lines))
    where = f" Its output: {log}." if failed > 0 else ""
    echo_error(f"{hosts[failed]} (node {failed}) ended with status {statuses[failed]}.{where}")
    return 2 if statuses[failed] == 2 else 1
