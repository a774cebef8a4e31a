"""SkyPilot: the task, and what is asked of sky."""

from pathlib import Path

import yaml

from longctx.launch.cluster import skypilot
from longctx.launch.cluster.job import plan_job
from longctx.launch.cluster.profile import SkyPilotProfile
from longctx.launch.cluster.skypilot import SkyPilot


def prepared(**keys):
    profile = SkyPilotProfile(executor="skypilot", **{"ranks": 2, **keys})
    job = plan_job("quickstart", [], [], profile, None)
    return SkyPilot(profile), job, SkyPilot(profile).prepare(job)


def test_the_nodes_of_a_task_find_the_first_one(workplace):
    _, _, submission = prepared(nodes=2, ranks=1)
    task = yaml.safe_load(submission.files[submission.script])
    assert (task["name"], task["num_nodes"], "resources" in task) == ("quickstart", 2, False)
    assert "export PET_NNODES=$SKYPILOT_NUM_NODES PET_NODE_RANK=$SKYPILOT_NODE_RANK\n" in task["run"]
    assert 'export PET_MASTER_ADDR=$(head -n1 <<< "$SKYPILOT_NODE_IPS") PET_MASTER_PORT=29500\n' in task["run"]


def test_what_sky_is_asked_of_a_managed_job(workplace, tools):
    tools.add("sky", "ID  NAME\n1  other\n2  quickstart")
    executor, job, submission = prepared()
    record = executor.submit(job, submission)
    assert record.identity == "managed/quickstart"
    assert skypilot.status(record) == "ID  NAME\n2  quickstart"
    skypilot.cancel(record, now=False)
    assert tools.calls() == [
        "sky jobs launch --name quickstart --detach-run --yes runs/quickstart/job/job.yaml",
        "sky jobs queue --all",
        "sky jobs cancel --name quickstart --yes",
    ]
    assert skypilot.log_command(record, Path(), 0, follow=False) == (
        "sky",
        "jobs",
        "logs",
        "--name",
        "quickstart",
        "--no-follow",
    )


def test_what_sky_is_asked_of_a_cluster(workplace, tools):
    tools.add("sky", "said")
    executor, job, submission = prepared(managed=False)
    record = executor.submit(job, submission)
    assert skypilot.status(record) == "said"
    skypilot.cancel(record, now=False)
    assert tools.calls() == [
        "sky launch --cluster quickstart --detach-run --yes runs/quickstart/job/job.yaml",
        "sky status quickstart",
        "sky cancel quickstart --all --yes",
    ]
    assert skypilot.log_command(record, Path(), 0, follow=True) == ("sky", "logs", "quickstart")
