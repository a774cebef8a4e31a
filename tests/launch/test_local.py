"""How a job of local ranks ends: its exit status, what is said, and that nothing is left running."""

import os
import pty
import re
import signal
import socket

import pytest

from longctx.launch import local
from longctx.launch.job_environment import Meeting, NodeOfJob
from longctx.launch.rank_settings import threads_per_rank
from tests.combinations import mostly_slow


def test_ranks_find_torchruns_environment(start, tmp_path):
    assert start("describe", 3, env={"OMP_NUM_THREADS": "7"}).wait()[0] == 0
    for rank in range(3):
        assert (tmp_path / f"rank-{rank}.txt").read_text() == f"{rank} {rank} 3 3 7 lo"


def test_ranks_share_the_cores_unless_set_otherwise(start, tmp_path):
    assert start("describe", 2).wait()[0] == 0
    assert (tmp_path / "rank-1.txt").read_text().split()[-2] == str(threads_per_rank(2))


def test_the_ranks_of_one_node_are_numbered_after_those_of_the_nodes_before(tmp_path):
    node = NodeOfJob("a test", 1, 3, Meeting("head", 1234))
    environment = local._environment(1, 2, tmp_path, node)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in names] == ["3", "6", "1", "2", "1", "head", "1234"]
    alone = {*local._environment(1, 2, tmp_path, None)} - {*environment}
    assert alone >= {"LONGCTX_STORE", "LONGCTX_HEARTBEATS"}, "files of one machine, by which no other is reached"


def test_a_line_says_at_once_what_is_started(tmp_path, capfd):
    local.run_ranks("fake_ranks:no_such", {}, ranks=1, logs=tmp_path, title="mine, in runs/mine")
    assert capfd.readouterr().err.startswith("Starting 1 rank on this machine: mine, in runs/mine\n")


def test_the_failure_of_one_nodes_ranks_names_the_node(start, tmp_path):
    status, _, stderr = start("crash_on_1", node=(1, 2)).wait()
    assert status == 1
    host = socket.gethostname()
    assert f"error: rank 3 on {host} was killed" not in stderr
    assert stderr.endswith(
        f"error: rank 3 on {host} failed with the error above; the other ranks were stopped. ADVICE\n"
    )
    assert {file.name for file in (tmp_path / "logs").iterdir()} == {"rank-2.log", "rank-3.log"}


def test_a_job_leaves_no_folder_and_removes_that_of_a_killed_launcher(start, tmp_path):
    folders = tmp_path / "folders"
    folders.mkdir()
    launcher = start("hang", env={"TMPDIR": str(folders)})
    launcher.pids()
    launcher.process.kill()
    launcher.process.wait()
    assert len(os.listdir(folders)) == 1
    assert start("talk", env={"TMPDIR": str(folders)}).wait()[0] == 0
    assert os.listdir(folders) == []


# What is shown


def test_rank_0_has_the_terminal_and_the_others_a_log(start, tmp_path):
    ours, theirs = pty.openpty()
    launcher = start("talk", stdout=theirs, stderr=theirs)
    assert launcher.wait()[0] == 0
    os.close(theirs)
    assert os.read(ours, 4096).decode().splitlines() == ["stdout of 0, a terminal: True", "stderr of 0"]
    os.close(ours)
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "stdout of 1, a terminal: False\nstderr of 1\n"
    assert not (tmp_path / "logs" / "rank-0.log").exists()


def test_ranks_import_nothing_from_the_working_directory(start, tmp_path):
    for name in ("json", "ctypes"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the working directory')")
    assert start("talk", cwd=tmp_path).wait()[0] == 0
    assert (tmp_path / "logs" / "rank-1.log").read_text().startswith("stdout of 1")


def test_a_log_keeps_what_earlier_runs_wrote(start, tmp_path):
    for _ in range(2):
        start("talk").wait()
    assert (tmp_path / "logs" / "rank-1.log").read_text().count("stderr of 1\n") == 2


# Errors


def test_a_user_error_of_every_rank_is_said_once(start):
    status, stdout, stderr = start("user_error", 3).wait()
    assert status == 2
    assert stdout == ""
    assert stderr == "error: data.path: there is no such directory [as rank 0 sees it]\n"


def test_a_user_error_of_one_rank_stops_the_others(start):
    launcher = start("user_error_on_1", settle=0.5)
    assert launcher.wait() == (2, "", "error: only here\n")
    assert launcher.seconds() < 10


@pytest.mark.parametrize("function", mostly_slow(["crash_on_1", "crash_on_both"], "crash_on_both"))
def test_an_error_is_shown_once_with_the_traceback_of_its_cause(start, tmp_path, function):
    launcher = start(function)
    status, _, stderr = launcher.wait()
    assert status == 1
    lines = stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].endswith(f"in {function}")
    assert lines[-2:] == [
        "KeyError: 'the cause'",
        "error: rank 1 failed with the error above; the other ranks were stopped. ADVICE",
    ]
    assert stderr.count("Traceback") == 1
    assert "KeyError: 'the cause'" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert launcher.seconds() < 10


def test_what_a_rank_said_before_it_ended_itself_is_in_the_last_line(start, tmp_path):
    """And not what it said at an earlier start: logs are appended to."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.log").write_text("error: of before\n")
    *_, last = start("end_itself_on_1", settle=0.2).wait()[2].splitlines()
    assert last.startswith("error: rank 1 exited with status 1; the other ranks were stopped; it says: step 3: it has")
    assert "waited for 9 s. Its output: " in last
    (tmp_path / "logs" / "rank-1.log").write_text("error: of before\n")
    assert "it says" not in start("exit_3_on_1", settle=0.2).wait()[2]


def test_a_rank_that_exits_without_an_error_is_named_with_its_log(start, tmp_path):
    status, _, stderr = start("exit_3_on_1", settle=0.2).wait()
    assert status == 1
    assert stderr == (
        "error: rank 1 exited with status 3; the other ranks were stopped. "
        f"Its output: {tmp_path}/logs/rank-1.log. ADVICE\n"
    )


def test_a_job_that_cannot_be_found_is_a_failure(start):
    status, _, stderr = start("no_such_function", 1).wait()
    assert status == 1
    assert "has no attribute 'no_such_function'" in stderr


# Ranks that hang


def test_a_rank_that_does_not_come_is_named_and_the_job_ends(start, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.stacks").write_text("of an earlier run")
    launcher = start("stop_reporting_on_1", env={"LC_ALL": "C"})
    status, _, stderr = launcher.wait()
    assert status == 1
    assert re.fullmatch(
        r"error: rank 1 \(process \d+ on node1\) has not reported for \d+ s: its process is stopped, or its machine "
        r"does not answer\. Its last report: step 7, at longctx\.model\.ffn:128 in forward\. rank 0 waits in step 7, "
        rf"barrier\. Stacks of the ranks that answer: {tmp_path}/logs/rank-\*\.stacks\. ADVICE\n",
        stderr,
    )
    assert [path.name for path in (tmp_path / "logs").glob("*.stacks")] == ["rank-0.stacks"]
    assert launcher.seconds() < 15


# Killed ranks


@pytest.mark.parametrize("function", ["hang", "lose_peer"])
def test_a_killed_rank_is_named_and_the_others_are_stopped(start, tmp_path, function):
    launcher = start(function, settle=0.5)
    pids = launcher.pids()
    os.kill(pids[1], signal.SIGKILL)
    status, _, stderr = launcher.wait()
    assert status == 1
    assert stderr == (
        "error: rank 1 was killed by SIGKILL (by the kernel if memory ran out; see dmesg); "
        f"the other ranks were stopped. Its output: {tmp_path}/logs/rank-1.log. ADVICE\n"
    )
    assert launcher.seconds() < 10
    assert not any(map(launcher.is_running, pids))


def test_what_a_rank_started_ends_with_it(start, tmp_path):
    launcher = start("leave_a_child", 1)
    assert launcher.wait()[0] == 0
    child = int((tmp_path / "child-0").read_text())
    launcher.wait_until(lambda: not launcher.is_running(child))


def test_ranks_die_with_a_launcher_that_is_killed(start):
    launcher = start("ignore_sigterm")
    pids = launcher.pids()
    launcher.process.kill()
    launcher.wait_until(lambda: not any(map(launcher.is_running, pids)))


# Signals to the launcher


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ranks_save_before_a_signal_ends_the_job(start, tmp_path, number, status):
    launcher = start("save_at_sigterm")
    launcher.pids()
    launcher.process.send_signal(number)
    launcher.process.send_signal(number if number != signal.SIGINT else signal.SIGTERM)
    found, _, stderr = launcher.wait()
    assert found == status
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert stderr.endswith(f"stopped by {signal.Signals(number).name}. ADVICE\n")


def test_a_signal_to_a_rank_is_the_status_of_the_job_that_it_stopped(start):
    status, _, stderr = start("stop_as_one", 3).wait()
    assert status == 143
    assert stderr == "stopped by SIGTERM. ADVICE\n"


def test_ctrl_c_in_the_terminal_reaches_the_ranks_once_and_as_sigterm(start, tmp_path):
    launcher = start("save_at_sigterm", start_new_session=True)
    launcher.pids()
    os.killpg(launcher.process.pid, signal.SIGINT)  # what a terminal does: the whole foreground group
    assert launcher.wait()[0] == 130
    assert (tmp_path / "saved-0").exists()


def test_a_second_ctrl_c_stops_at_once(start):
    launcher = start("ignore_sigterm", save=60)
    pids = launcher.pids()
    launcher.process.send_signal(signal.SIGINT)
    line = launcher.process.stderr.readline()
    assert line == "SIGINT: saving and stopping, within 60 s; press Ctrl-C again to stop immediately\n"
    launcher.process.send_signal(signal.SIGINT)
    status, _, stderr = launcher.wait()
    assert status == 130
    assert stderr == "stopped by SIGINT; ranks 0, 1 exited without saving. ADVICE\n"
    assert not any(map(launcher.is_running, pids))


def test_ranks_that_do_not_save_in_time_are_killed(start):
    launcher = start("ignore_sigterm", save=0.3)
    pids = launcher.pids()
    launcher.process.terminate()
    assert launcher.wait()[0] == 143
    assert not any(map(launcher.is_running, pids))


def test_ranks_that_are_not_ready_to_save_end_at_sigterm(start):
    launcher = start("hang")
    launcher.pids()
    launcher.process.terminate()
    status, _, stderr = launcher.wait()
    assert status == 143
    assert stderr.endswith("stopped by SIGTERM; ranks 0, 1 exited without saving. ADVICE\n")


def test_a_save_that_fails_is_a_failure(start):
    launcher = start("fail_at_sigterm")
    launcher.pids()
    launcher.process.terminate()
    status, _, stderr = launcher.wait()
    assert status == 1
    assert "OSError: no space left" in stderr


def test_a_signal_that_the_launcher_ignores_stays_ignored(start):
    launcher = start("hang", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # as nohup does
    pids = launcher.pids()
    launcher.process.send_signal(signal.SIGHUP)
    launcher.process.terminate()
    assert launcher.wait()[0] == 143
    assert not any(map(launcher.is_running, pids))
