"""Kubernetes: a Kubeflow TrainJob (Trainer 2.3 and later), or a JobSet where there is no trainer, and kubectl.

One pod per node starts the node's ranks. Pods get PET_NNODES, PET_NODE_RANK and the address of the first one, from the
trainer or, in a JobSet, from the manifest, whose pods are an indexed job's.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.launch.cluster.job import MEETING_PORT, ClusterJob, Record, Submission, prologue, refuse_now
from longctx.launch.cluster.profile import KubernetesProfile
from longctx.launch.cluster.tools import run_tool, to_yaml

SCRIPT = "job.yaml"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?")
_SHARED_MEMORY, _SHARED_MEMORY_PATH = "shared-memory", "/dev/shm"  # torch's own place


class Kubernetes:
    """Jobs of Kubernetes."""

    def __init__(self, profile: KubernetesProfile) -> None:
        self._profile = profile

    def prepare(self, job: ClusterJob) -> Submission:
        """Return the manifest and the command that applies it: see Executor."""
        job.check_single("kubernetes")
        name = resource_name(job.name)
        manifest = self._train_job(job, name) if self._profile.kind == "trainjob" else self._job_set(job, name)
        script = job.folder_here / SCRIPT
        text = "# Written by longctx launch.\n" + to_yaml(manifest)
        return Submission({script: text}, script, ("kubectl", "apply", "--filename", str(script)))

    def submit(self, job: ClusterJob, submission: Submission) -> Record:
        """Submit it: see Executor."""
        run_tool(submission.command)
        identity, namespace = f"{self._profile.kind}/{resource_name(job.name)}", self._profile.namespace
        return Record(job.name, "kubernetes", identity, namespace, is_examination=not job.recipes)

    def _metadata(self, name: str) -> dict[str, object]:
        labels = {"kueue.x-k8s.io/queue-name": self._profile.queue}
        return {"name": name, "namespace": self._profile.namespace, "labels": labels}

    def _script(self, job: ClusterJob) -> str:
        recipe = f"/tmp/{job.name}.toml"  # in the pod's own file system
        run = [f"exec {job.command(self._profile, recipe, shlex.quote(str(job.out)))} --nproc {job.ranks}"]
        change = [f"cd {shlex.quote(self._profile.directory)}"] if self._profile.directory else []
        return "\n".join([*change, *prologue(self._profile), *job.write_recipe(recipe), *run]) + "\n"

    def _resources(self) -> dict[str, object]:
        profile = self._profile
        gpus = {profile.gpu_resource: str(profile.gpus)} if profile.gpus else {}
        amounts = {"cpu": profile.cpus, "memory": profile.memory, **gpus}
        return {"requests": amounts, "limits": amounts}

    def _volumes(self) -> dict[str, str]:
        """Return the names of volumes by their claims."""
        return {claim: f"volume-{number}" for number, claim in enumerate(dict.fromkeys(self._profile.volumes.values()))}

    def _pod(self, job: ClusterJob, container: dict[str, Any]) -> dict[str, object]:
        """Return the spec of a pod, or of a patch of one."""
        names = self._volumes()
        claims = [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in names.items()]
        mounts = [{"name": names[claim], "mountPath": path} for path, claim in self._profile.volumes.items()]
        # Ranks of a node exchange tensors in /dev/shm, of which a container has 64 MB by default.
        memory = {"name": _SHARED_MEMORY, "emptyDir": {"medium": "Memory"}}
        mounted = {"volumeMounts": [{"name": _SHARED_MEMORY, "mountPath": _SHARED_MEMORY_PATH}, *mounts]}
        return {
            # SIGTERM comes this long before SIGKILL: a step and then a save end within it.
            "terminationGracePeriodSeconds": round(2 * job.stop_seconds),
            "nodeSelector": self._profile.node_selector,
            "serviceAccountName": self._profile.service_account,
            "containers": [{"name": "node", **container, **mounted}],
            "volumes": [memory, *claims],
        }

    def _train_job(self, job: ClusterJob, name: str) -> dict[str, object]:
        node = {"name": "node", "template": {"spec": {"template": {"spec": self._pod(job, {})}}}}
        template = {"template": {"spec": {"replicatedJobs": [node]}}}
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": self._metadata(name),
            "spec": {
                "runtimeRef": {"name": self._profile.runtime},
                "trainer": {
                    "image": self._profile.image,
                    "numNodes": job.nodes,
                    "numProcPerNode": job.ranks,
                    "command": ["bash", "-c"],
                    "args": [self._script(job)],
                    "resourcesPerNode": self._resources(),
                },
                "runtimePatches": [{"manager": "longctx/launch", "trainingRuntimeSpec": template}],
            },
        }

    def _job_set(self, job: ClusterJob, name: str) -> dict[str, object]:
        index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        container = {
            "image": self._profile.image,
            "command": ["bash", "-c"],
            "args": [self._script(job)],
            "env": [
                {"name": "PET_NNODES", "value": str(job.nodes)},
                {"name": "PET_NODE_RANK", "valueFrom": index},
                {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
                {"name": "PET_MASTER_PORT", "value": str(MEETING_PORT)},
            ],
            "resources": self._resources(),
        }
        pod = {"restartPolicy": "Never", **self._pod(job, container)}
        pods = {"parallelism": job.nodes, "completions": job.nodes, "completionMode": "Indexed", "backoffLimit": 0}
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": self._metadata(name),
            "spec": {
                "failurePolicy": {"maxRestarts": self._profile.retries},
                "network": {"enableDNSHostnames": True},
                "replicatedJobs": [{"name": "node", "template": {"spec": {**pods, "template": {"spec": pod}}}}],
            },
        }


def resource_name(name: str) -> str:
    """Return the name of a run as Kubernetes takes it: lower case, `-` for `_` and `.`. Raises UserError."""
    result = re.sub(r"[_.]", "-", name.lower())
    if not _NAME.fullmatch(result):
        raise UserError(
            f"name: {name!r} cannot name a job of Kubernetes: use at most 52 letters, digits and '-', with a letter or "
            "a digit at both ends"
        )
    return result


def resource(record: Record) -> tuple[str, ...]:
    """Return the arguments of kubectl that name a job."""
    kind, _, name = record.identity.partition("/")
    return (kind, name, "--namespace", record.namespace)


def status(record: Record) -> str:
    """Return the state of a job and its pods, as kubectl shows them."""
    kind, name, *space = resource(record)
    job = run_tool(("kubectl", "get", kind, name, *space))
    pods = run_tool(("kubectl", "get", "pods", "--selector", f"jobset.sigs.k8s.io/jobset-name={name}", *space))
    return f"{job}{pods}".rstrip("\n")


def cancel(record: Record, *, now: bool) -> str:
    """Delete a job, whose pods get SIGTERM, and save: see Follower."""
    refuse_now(record, now=now)
    return run_tool(("kubectl", "delete", *resource(record), "--wait=false")).rstrip("\n")


def log_command(record: Record, folder: Path, rank: int, *, follow: bool) -> tuple[str, ...]:
    """Return the command that prints the log of the node `rank`: see Follower."""
    _, name, *space = resource(record)
    selector = f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index={rank}"
    return ("kubectl", "logs", "--selector", selector, "--tail=-1", *space, *(["--follow"] if follow else []))
