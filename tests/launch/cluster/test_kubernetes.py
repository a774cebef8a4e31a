"""Kubernetes: what a manifest says, and what is asked of kubectl. `tests/adapters` compares them with the schemas."""

from pathlib import Path

import pytest
import yaml

from longctx.errors import UserError
from longctx.launch.cluster import kubernetes
from longctx.launch.cluster.job import Record, plan_job
from longctx.launch.cluster.kubernetes import Kubernetes, resource_name
from longctx.launch.cluster.profile import KubernetesProfile

RECORD = Record("quickstart", "kubernetes", "trainjob/quickstart", "research")


def manifest(overrides=(), **keys):
    profile = KubernetesProfile(executor="kubernetes", image="i", **{"ranks": 2, **keys})
    submission = Kubernetes(profile).prepare(plan_job("quickstart", overrides, [], profile, None))
    return yaml.safe_load(submission.files[submission.script])


def pod_of(job):
    if job["kind"] == "TrainJob":
        (patch,) = job["spec"]["runtimePatches"]
        job = patch["trainingRuntimeSpec"]["template"]
    (node,) = job["spec"]["replicatedJobs"]
    return node["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_ranks_have_shared_memory_volumes_and_time_to_save(workplace, kind):
    pod = pod_of(manifest(["parallel.timeout=5m"], kind=kind, volumes={"/a": "one", "/b": "two", "/c": "one"}))
    assert pod["terminationGracePeriodSeconds"] == 600
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
    claims = {path: volumes[mounts[path]]["persistentVolumeClaim"]["claimName"] for path in ("/a", "/b", "/c")}
    assert claims == {"/a": "one", "/b": "two", "/c": "one"}
    assert len(volumes) == 3, "a claim is one volume, however often it is mounted"


def test_what_is_not_asked_for_is_not_in_the_manifest(workplace):
    job = manifest()
    assert job["metadata"] == {"name": "quickstart", "namespace": "default"}
    assert job["spec"]["trainer"].keys() == {"image", "numNodes", "numProcPerNode", "command", "args"}
    limits = manifest(["train.sequences_per_step=4"], gpus=8, ranks=8)
    assert limits["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}


def test_the_pods_of_a_job_set_find_the_first_one(workplace):
    (container,) = pod_of(manifest(kind="jobset", nodes=2, ranks=1))["containers"]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert values == {
        "PET_NNODES": "2",
        "PET_NODE_RANK": None,
        "PET_MASTER_ADDR": "quickstart-node-0-0.quickstart",
        "PET_MASTER_PORT": "29500",
    }


def test_names_are_those_that_kubernetes_takes():
    assert resource_name("My_run.2") == "my-run-2"
    for name in ("-run", "x" * 60):
        with pytest.raises(UserError, match="cannot name a job of Kubernetes"):
            resource_name(name)


def test_what_kubectl_is_asked(workplace, tools):
    tools.add("kubectl", "said")
    profile = KubernetesProfile(executor="kubernetes", image="i", ranks=2)
    executor, job = Kubernetes(profile), plan_job("quickstart", [], [], profile, None)
    record = executor.submit(job, executor.prepare(job))
    assert (record.identity, record.namespace) == ("trainjob/quickstart", "default")
    assert kubernetes.status(RECORD) == "said\nsaid"
    kubernetes.cancel(RECORD, now=False)
    with pytest.raises(UserError, match="--now: kubernetes has one way to end a job"):
        kubernetes.cancel(RECORD, now=True)
    assert tools.calls() == [
        "kubectl apply --filename runs/quickstart/job/job.yaml",
        "kubectl get trainjob quickstart --namespace research",
        "kubectl get pods --selector jobset.sigs.k8s.io/jobset-name=quickstart --namespace research",
        "kubectl delete trainjob quickstart --namespace research --wait=false",
    ]
    assert kubernetes.log_command(RECORD, Path(), 1, follow=True)[-3:] == ("--namespace", "research", "--follow")
