"""What a process finds out about its job from the variables of torchrun and schedulers."""

from dataclasses import replace

import pytest

from longctx.errors import UserError
from longctx.launch.job_environment import Meeting, NodeOfJob, RankOfJob, find_job, first_of_hostlist

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "head"} | {
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "x",
}
SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "localhost,n2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node1-7@1",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_PORT": "29500"}
KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "head",
    "PET_MASTER_PORT": "29500",
}
INDEXED = {"WORLD_SIZE": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}


def find(environment: dict[str, str], **changes: str | None) -> RankOfJob | NodeOfJob | None:
    """What is found with some variables changed, None: unset."""
    changed = environment | changes
    return find_job(environment={name: value for name, value in changed.items() if value is not None})


def test_outside_a_job_nothing_is_found():
    assert find({}) is None
    assert find({"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}) is None, "a batch script"


def test_torchruns_variables():
    assert find(TORCHRUN) == RankOfJob("torchrun", 3, 4, 1, 2, Meeting("head", 29400))
    found = find(TORCHRUN, TORCHELASTIC_RUN_ID=None, LOCAL_RANK=None, LOCAL_WORLD_SIZE=None)
    assert found == RankOfJob("RANK and WORLD_SIZE", 3, 4, None, 1, Meeting("head", 29400))


def test_the_variables_that_are_set_for_a_rank_are_found_again():
    for environment in (TORCHRUN, SLURM, OPEN_MPI, PMI, INDEXED):
        job = find(environment)
        assert isinstance(job, RankOfJob)
        again = find(job.variables())
        assert again == replace(job, found="RANK and WORLD_SIZE")


def test_a_slurm_task_is_a_rank():
    job = find(SLURM)
    assert isinstance(job, RankOfJob)
    assert (job.found, job.rank, job.size, job.local_rank, job.local_size) == ("Slurm step 12.0", 3, 4, 1, 2)
    assert job.meeting.address == "localhost"
    assert 15_000 <= job.meeting.port < 30_000
    assert find(SLURM, SLURM_PROCID="0").meeting == job.meeting, "all tasks derive the same port"
    assert find(SLURM, SLURM_STEP_ID="1").meeting != job.meeting, "another step another one"
    assert find(SLURM, MASTER_ADDR="head", MASTER_PORT="1234").meeting == Meeting("head", 1234)
    assert find(SLURM, SLURM_STEP_TASKS_PER_NODE="3,1").local_size == 1
    assert "Slurm step 12.0: 4 ranks, 2 on this node; rank 0 at localhost:" in job.describe()


def test_slurm_nodes_whose_names_have_no_address_meet_at_the_batch_scripts_node():
    missing = SLURM | {"SLURM_STEP_NODELIST": "no-such-host-[3-4]"}
    assert find(missing, SLURM_LAUNCH_NODE_IPADDR="10.0.0.3").meeting.address == "10.0.0.3"
    with pytest.raises(UserError, match=r"first node, 'no-such-host-3' \(SLURM_STEP_NODELIST\), has no address"):
        find(missing)


def test_one_slurm_task_per_node_starts_the_ranks_that_it_is_asked_for():
    tasks = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "MASTER_PORT": "1234"}
    found = find_job(8, environment=tasks | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"})
    assert found == NodeOfJob("Slurm step 12.0", 1, 2, Meeting("localhost", 1234))
    assert isinstance(find_job(8, environment=SLURM), RankOfJob), "two tasks per node are ranks"


def test_a_job_of_one_task_is_none():
    assert find(SLURM, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_NUM_NODES="1") is None
    assert find(OPEN_MPI, OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0") is None


def test_mpi_ranks():
    assert find(PMI) == RankOfJob("PMI", 1, 2, 1, 2, Meeting("localhost", 29500))
    job = find(OPEN_MPI)
    assert (job.found, job.rank, job.size, job.meeting.address) == ("Open MPI", 1, 2, "localhost")
    several = find(OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE="1", MASTER_ADDR="head", MASTER_PORT="7")
    assert several == RankOfJob("Open MPI", 1, 2, 1, 1, Meeting("head", 7))


def test_kubeflows_nodes():
    assert find(KUBEFLOW) == NodeOfJob("PET_NNODES", 1, 2, Meeting("head", 29500), 8)
    endpoint = {"PET_MASTER_ADDR": None, "PET_MASTER_PORT": None, "PET_RDZV_ENDPOINT": "other:1"}
    assert find(KUBEFLOW, **endpoint, PET_NPROC_PER_NODE="auto") == NodeOfJob("PET_NNODES", 1, 2, Meeting("other", 1))
    assert find(KUBEFLOW, PET_NNODES="1").nodes == 1
    assert find(KUBEFLOW | TORCHRUN) == find(TORCHRUN), "torchrun has read them"


def test_the_pods_of_an_indexed_job():
    assert find(INDEXED) == RankOfJob("JOB_COMPLETION_INDEX and WORLD_SIZE", 1, 2, 0, 1, Meeting("head", 29500))


@pytest.mark.parametrize(
    ("environment", "changes", "text"),
    [
        (TORCHRUN, {"WORLD_SIZE": None}, "RANK is set, but WORLD_SIZE is not: set WORLD_SIZE too, or unset RANK to"),
        (TORCHRUN, {"MASTER_ADDR": None}, "RANK and WORLD_SIZE are set, but MASTER_ADDR is not"),
        (TORCHRUN, {"MASTER_PORT": None}, "RANK and WORLD_SIZE are set, but MASTER_PORT is not"),
        (TORCHRUN, {"RANK": "4"}, "RANK 4: expected less than WORLD_SIZE, 4"),
        (TORCHRUN, {"RANK": "-1"}, "RANK '-1': expected a number"),
        (TORCHRUN, {"MASTER_PORT": "99999"}, "MASTER_PORT 99999: expected at most 65535"),
        (INDEXED, {"JOB_COMPLETION_INDEX": None}, "WORLD_SIZE is set, but RANK is not"),
        (INDEXED, {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX 2: expected less than WORLD_SIZE, 2"),
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE 'two': expected numbers such as"),
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": "4"}, "SLURM_NODEID 1: SLURM_STEP_TASKS_PER_NODE '4' has 1 nodes"),
        (SLURM, {"SLURM_PROCID": None}, "SLURM_STEP_ID is set, but SLURM_PROCID is not"),
        (SLURM, {"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS 'x': expected a number"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "2 ranks (OMPI_COMM_WORLD_SIZE) on several nodes, and MASTER"),
        (PMI, {"MASTER_PORT": None}, "PMI_RANK is set, but MASTER_PORT is not"),
        (KUBEFLOW, {"PET_NNODES": "1:4"}, "PET_NNODES '1:4': an elastic number of nodes needs torchrun"),
        (KUBEFLOW, {"PET_NODE_RANK": "2"}, "PET_NODE_RANK 2: expected less than PET_NNODES, 2"),
        (KUBEFLOW, {"PET_MASTER_ADDR": None}, "PET_NNODES is set, but PET_MASTER_ADDR is not"),
        (
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"},
            {},
            "this is the batch script of a Slurm job with 2 nodes (SLURM_JOB_NUM_NODES), not one of its tasks",
        ),
        (
            SLURM | TORCHRUN,
            {"TORCHELASTIC_RUN_ID": None, "RANK": "0"},
            "RANK is 0 and SLURM_PROCID is 3, in a Slurm step with as many tasks as WORLD_SIZE: unset RANK",
        ),
    ],
)
def test_what_is_missing_or_contradictory_is_named(environment, changes, text):
    with pytest.raises(UserError) as error:
        find(environment, **changes)
    assert text in str(error.value)


def test_the_first_name_of_a_host_list():
    lists = {"n1": "n1", "n[1-3,5]": "n1", "gpu-[007-009].cluster,x": "gpu-007.cluster", "a,b[1-2]": "a", "b[3]": "b3"}
    assert {text: first_of_hostlist(text) for text in lists} == lists
