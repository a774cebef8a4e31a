"""A Slurm of the tests' own, from Debian's packages: its controller on the first of two hosts, a node on each.

Everything that it writes is in one folder, and its ports are those of the hosts' networks, so that several run beside
each other and none beside that of the machine.
"""

import contextlib
import os
import random
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from tests.e2e.two_hosts import Host, environment, two_hosts, wait_until, why_not

CONFIGURATION = """
ClusterName=rehearsal
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits for the end of its credentials before it starts.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort=6817
SlurmdPort=6818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={grace}
MinJobAge=3600
InactiveLimit=0
# Job ids are in the addresses of ranks.
FirstJobId={job}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
GRACE = 20
"""Seconds between SIGTERM and SIGKILL, of a job that is preempted or at its time limit."""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_WHY_NOT = why_not(*_PROGRAMS)
needs_slurm = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)


class Slurm:
    """A controller and two nodes with a core each; partitions `low`, the default, and `high`, which preempts it."""

    def __init__(self, folder: Path, hosts: tuple[Host, Host]) -> None:
        self.folder, self.hosts = folder, hosts
        first = hosts[0]
        nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=1 RealMemory=8000" for host in hosts]
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                first=first.name,
                address=first.address,
                folder=folder,
                grace=GRACE,
                job=random.randint(1, 60_000),
                nodes="\n".join(nodes),
            )
        )
        # Debian's slurmd asks what kind of cgroups there is, and ends where there is none, unless it is told.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("munge", "state", *(f"spool-{host.name}" for host in hosts)):
            (folder / name).mkdir(mode=0o755)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._environment = environment() | {"SLURM_CONF": str(configuration)}
        files = [
            f"--{kind}={folder}/munge/{kind.removesuffix('-file')}"
            for kind in ("key-file", "log-file", "pid-file", "seed-file")
        ]
        self._on(first, "munged", f"--socket={folder}/munge/socket", *files, "--force")
        self._on(first, "slurmctld", "-c")
        for host in hosts:
            self.start_node(host)
        wait_until(lambda: self._states() == ["idle", "idle"], 30, lambda: f"not idle: {self._states()}")

    def _on(self, host: Host, *command: str, cwd: Path | None = None) -> str:
        process = host.popen(*command, cwd=cwd or self.folder, env=self._environment)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, f"{command}: {stderr}"
        return stdout

    def start_node(self, host: Host) -> None:
        """Start the daemon of a node."""
        self._on(host, "slurmd", "-N", host.name)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run one of Slurm's commands on the first host; return its stdout."""
        return self._on(self.hosts[0], *command, cwd=cwd)

    def submit(self, script: Path, *options: str) -> int:
        """Submit a script from its folder; return the job's id."""
        return int(self.run("sbatch", "--parsable", *options, str(script), cwd=script.parent))

    def show(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        return dict(
            re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", self.run("scontrol", "--oneliner", "show", "job", str(job)).strip())
        )

    def wait(self, job: int, *states: str, restarts: int = 0, timeout: float = 60) -> dict[str, str]:
        """Wait until a job is in one of the states, after so many restarts; return what `show` says then."""
        shown: dict[str, str] = {}

        def has_come() -> bool:
            shown.update(self.show(job))
            return shown["JobState"] in states and int(shown["Restarts"]) >= restarts

        wait_until(has_come, timeout, lambda: f"not {states}: {shown}\n{self.log(job)}")
        return shown

    def shorten(self, job: int, seconds: float) -> None:
        """Set a running job's time limit to the first after so many seconds from now; limits are whole minutes."""
        began = datetime.fromisoformat(self.show(job)["StartTime"])
        minutes = -int(-((datetime.now() - began).total_seconds() + seconds) // 60)
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def log(self, job: int) -> str:
        """What a job's script has written."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def tasks(self, job: int) -> list[psutil.Process]:
        """The processes that srun has started for a job, in order."""
        found = {}
        for process in (process for host in self.hosts for process in host.processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                variables = process.environ()
                if (
                    variables.get("SLURM_JOB_ID") == str(job)
                    and variables.get("SLURM_TASK_PID")
                    and "train" in process.cmdline()
                ):
                    found[int(variables["SLURM_PROCID"])] = process
        return [found[rank] for rank in sorted(found)]

    def _states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").split()


@contextmanager
def running_slurm() -> Iterator[Slurm]:
    """A Slurm on two hosts of its own, which is removed with all that runs in it."""
    with tempfile.TemporaryDirectory(prefix="longctx-slurm-") as folder, two_hosts() as hosts:
        yield Slurm(Path(folder), hosts)
