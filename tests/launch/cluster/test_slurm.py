"""Slurm: the batch script, and what is asked of sbatch, scontrol and scancel."""

import shutil
import subprocess

import pytest

from longctx.errors import UserError
from longctx.launch.cluster import slurm
from longctx.launch.cluster.job import Record, plan_job
from longctx.launch.cluster.profile import SlurmProfile
from longctx.launch.cluster.slurm import Slurm, time_limit

RECORD = Record("quickstart", "slurm", "12")


def script(*, sweep=(), out=None, **keys) -> str:
    profile = SlurmProfile(executor="slurm", **{"ranks": 2, **keys})
    submission = Slurm(profile).prepare(plan_job("quickstart", [], sweep, profile, out))
    return submission.files[submission.script]


def test_what_is_not_in_the_profile_is_not_in_the_script(workplace):
    options = [line.removeprefix("#SBATCH ") for line in script().splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=quickstart",
        f"--chdir={workplace}",
        "--output=runs/quickstart/logs/job-%j.log",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks-per-node=2",
        "--requeue",
    ]


def test_the_signal_leaves_time_for_a_step_and_a_save(workplace):
    assert "--signal=TERM@600\n" in script(time=86400.0), "parallel.timeout"
    assert "--signal=TERM@300\n" in script(time=600.0), "no more than half of the time"
    assert "--signal=TERM@60\n" in script(time=600.0, stop_before=60.0)
    assert "--signal" not in script()


def test_a_job_that_shall_not_be_queued_again_is_not(workplace):
    text = script(requeue=False)
    assert "--no-requeue\n" in text
    assert "scontrol" not in text


def test_a_sweep_is_an_array_whose_elements_have_directories(workplace):
    text = script(sweep=["optimizer.lr=1e-3,3e-4"])
    assert "--array=0-1\n" in text
    assert "--output=runs/quickstart/%a/logs/job-%A_%a.log\n" in text
    assert "run=runs/quickstart/$SLURM_ARRAY_TASK_ID\n" in text


def run_script(text, tmp_path, tools, *, leaves=()):
    """Run a batch script with a srun that leaves files in the run directory; return what was called."""
    tools.add("srun", body="".join(f"touch {file}\n" for file in leaves), status=143)
    tools.add("scontrol")
    (tmp_path / "script").write_text(text)
    environment = {"PATH": f"{tmp_path}/bin", "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash", tmp_path / "script"], env=environment, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    return [call for call in tools.calls() if not call.startswith("srun")]


def test_a_run_that_a_signal_stopped_is_queued_again_and_no_other(workplace, tmp_path, tools):
    run = workplace / "runs/quickstart"
    (run / "job").mkdir(parents=True)
    (run / "stopped").touch()
    assert run_script(script(), tmp_path, tools) == [], "what an earlier start left says nothing"
    assert not (run / "stopped").exists()
    assert run_script(script(), tmp_path, tools, leaves=[run / "stopped"]) == ["scontrol requeue 12"]
    (run / "job/cancelled").touch()
    assert len(run_script(script(), tmp_path, tools, leaves=[run / "stopped"])) == 1, "it was cancelled"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize(
    "keys", [{}, {"sweep": ["optimizer.lr=1e-3,3e-4"]}, {"container": "a b", "cpus": 4, "setup": ("module load x",)}]
)
def test_shellcheck_finds_nothing(workplace, keys):
    text = script(**keys, environment={"A": "1 2"})
    found = subprocess.run(["shellcheck", "--shell=bash", "-"], input=text, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_it_is_submitted_with_its_folders(workplace, tools):
    tools.add("sbatch", "12;cluster")
    profile = SlurmProfile(executor="slurm", ranks=2)
    executor, job = Slurm(profile), plan_job("quickstart", [], [], profile, None)
    (workplace / "runs/quickstart/job").mkdir(parents=True)
    (workplace / "runs/quickstart/job/cancelled").touch()
    assert executor.submit(job, executor.prepare(job)) == RECORD
    assert tools.calls() == [f"sbatch --parsable {workplace}/runs/quickstart/job/job.sbatch"]
    assert (workplace / "runs/quickstart/logs").is_dir()
    assert not (workplace / "runs/quickstart/job/cancelled").exists()


def test_a_curriculum_is_a_job_per_stage(workplace, tools):
    tools.add("sbatch", "12;cluster")
    curriculum = ['stage=[{ name = "4ki" }, { name = "32ki" }, { name = "1mi" }]']
    profile = SlurmProfile(executor="slurm", ranks=2)
    executor, job = Slurm(profile), plan_job("quickstart", curriculum, [], profile, None)
    submission = executor.prepare(job)
    assert executor.submit(job, submission).identity == "12,12,12"
    path = f"{workplace}/runs/quickstart/job/job.sbatch"
    after = "--dependency=afterok:12 --kill-on-invalid-dep=yes"
    assert tools.calls() == [
        f"sbatch --parsable --job-name=quickstart-4ki {path} 4ki",
        f"sbatch --parsable {after} --job-name=quickstart-32ki {path} 32ki",
        f"sbatch --parsable {after} --job-name=quickstart-1mi {path} 1mi",
    ]
    assert '--out "$run" --stage "$1"\n' in submission.files[submission.script]


def test_runs_of_a_sweep_train_all_their_stages(workplace):
    curriculum = ['stage=[{ name = "4ki" }, { name = "32ki" }]']
    profile = SlurmProfile(executor="slurm", ranks=2)
    submission = Slurm(profile).prepare(plan_job("quickstart", curriculum, ["seed=1,2"], profile, None))
    assert not submission.then
    assert "--stage" not in submission.files[submission.script]


def test_what_sbatch_refuses_is_said(workplace, tools):
    tools.add("sbatch", "sbatch: error: invalid partition specified: gpu", status=1)
    profile = SlurmProfile(executor="slurm", ranks=2)
    executor, job = Slurm(profile), plan_job("quickstart", [], [], profile, None)
    with pytest.raises(UserError, match=r"sbatch --parsable .*job.sbatch: sbatch: error: invalid partition"):
        executor.submit(job, executor.prepare(job))


def test_times_are_written_as_slurm_reads_them():
    assert [time_limit(seconds) for seconds in (90, 3600.5, 129_600)] == ["00:01:30", "01:00:01", "1-12:00:00"]


def test_a_line_of_the_setup_that_fails_ends_the_job_and_is_named(workplace, tmp_path, tools):
    text = script(setup=("true", "source nowhere"))
    (tmp_path / "script").write_text(text)
    tools.add("srun")
    environment = {"PATH": f"{tmp_path}/bin", "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash", tmp_path / "script"], env=environment, capture_output=True, text=True)
    number = text.splitlines().index("source nowhere || failed $LINENO") + 1
    assert (done.returncode, tools.calls()) == (2, [])
    assert "nowhere: No such file or directory\n" in done.stderr
    assert done.stderr.endswith(f"error: line {number} of this script, which is of the profile's setup, failed\n")


def test_the_state_of_a_running_job(tools):
    tools.add(
        "scontrol",
        "JobId=12 JobState=RUNNING Reason=None Restarts=1 RunTime=00:01:00 TimeLimit=1-00:00:00 NodeList=n[1-2]",
    )
    assert slurm.status(RECORD) == "Slurm job 12: running, on n[1-2], after 1 restart, for 00:01:00 of 1-00:00:00"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("NodeList=(null)", "Slurm job 12_1: pending, because of Priority (jobs before it in the queue wait too)"),
        (
            "NodeList= StartTime=2026-11-28T09:00:00",
            "Slurm job 12_1: pending, because of Priority (jobs before it in the queue wait too), expected to start at "
            "2026-11-28 09:00:00",
        ),
    ],
)
def test_the_state_of_a_job_that_waits(tools, fields, said):
    tools.add("scontrol", f"JobId=14 ArrayJobId=12 ArrayTaskId=1 JobState=PENDING Reason=Priority {fields}")
    assert slurm.status(RECORD) == said


def test_the_state_of_a_job_that_has_failed_says_where_to_look(tools):
    tools.add("scontrol", "JobId=12 JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0 StdOut=/w/job-12.log")
    assert slurm.status(RECORD) == "Slurm job 12: failed, exit status 2: see /w/job-12.log"


def test_the_state_of_a_job_that_slurm_does_not_know(tools):
    tools.add("scontrol", "slurm_load_jobs error: Invalid job id specified", status=1)
    assert slurm.status(RECORD) == "Slurm job 12: not known to Slurm any more"
    tools.add("scontrol", "Unable to contact slurm controller", status=1)
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        slurm.status(RECORD)


@pytest.mark.parametrize(
    ("answer", "status", "active"),
    [
        ("RUNNING\nCOMPLETING", 0, True),
        ("PENDING", 0, True),
        ("COMPLETING", 0, False),
        ("", 0, False),
        ("slurm_load_jobs error: Invalid job id specified", 1, False),
    ],
)
def test_a_job_that_waits_or_runs_is_active(tools, answer, status, active):
    tools.add("squeue", answer, status)
    assert slurm.is_active(RECORD) == active


def test_a_log_is_waited_for_as_long_as_its_job_waits_or_runs(tmp_path, tools, monkeypatch, capsys):
    tools.add("scontrol", "JobId=12 JobState=PENDING Reason=Resources")
    tools.add("squeue", "PENDING")
    file = tmp_path / "logs" / "rank-1.log"

    def begin(seconds: float) -> None:
        file.parent.mkdir()
        file.touch()

    monkeypatch.setattr(slurm.time, "sleep", begin)
    assert slurm.log_command(RECORD, tmp_path, 1, follow=True) == ("tail", "--lines=+1", "--follow=name", str(file))
    waits = "Slurm job 12: pending, because of Resources (enough of its nodes are not free yet)"
    assert capsys.readouterr().err == f"Waiting for {file}. {waits}\n"

    tools.add("squeue", "")
    with pytest.raises(
        UserError, match=r"rank-2.log: there is no such log \(there are: .*rank-1.log\). Slurm job 12: pe"
    ):
        slurm.log_command(RECORD, tmp_path, 2, follow=True)


def test_a_job_is_cancelled_after_a_save_or_now(tools):
    tools.add("scancel")
    tools.add("squeue", "RUNNING\nPENDING")
    said = slurm.cancel(RECORD, now=False)
    assert said.startswith("Slurm job 12: it does not start; its ranks save and end; follow it with")
    assert [call for call in tools.calls() if call.startswith("scancel")] == [
        "scancel --state=PENDING 12",
        "scancel --signal=TERM 12",
    ]
    slurm.cancel(RECORD, now=True)
    assert tools.calls()[-1] == "scancel 12"


def test_the_jobs_of_stages_are_followed_and_cancelled_together(tools):
    record = Record("mine", "slurm", "12,13")
    tools.add("scontrol", body='echo "JobId=$4 JobState=PENDING Reason=Dependency"\n')
    assert [line.partition(",")[0] for line in slurm.status(record).splitlines()] == [
        "Slurm job 12: pending",
        "Slurm job 13: pending",
    ]
    tools.add("scancel")
    slurm.cancel(record, now=True)
    assert tools.calls()[-1] == "scancel 12 13"


def test_a_job_that_has_ended_is_not_cancelled(tools):
    tools.add("squeue", "")
    tools.add("scontrol", "JobId=12 JobState=COMPLETED")
    assert slurm.cancel(RECORD, now=False) == "Slurm job 12: completed: there is nothing to cancel"
