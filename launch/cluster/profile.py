"""Cluster profiles: what a scheduler has to be told to run any recipe, by executor.

A profile is a table of `clusters.toml`, named by its header; `extends = "other"` starts from another one of the file.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from longctx.config import Config, Duration, Integer, PathText
from longctx.errors import UserError
from longctx.recipe.loading import validated
from longctx.recipe.sources import MergedConfig, Origin, merge_tables, override, read_merged

FILE_NAME = "clusters.toml"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Profile(Config):
    """Keys of every profile."""

    nodes: Integer = Field(default=1, gt=0)
    """Nodes of the job; with ssh, its hosts."""
    gpus: Integer = Field(default=0, ge=0)
    """GPUs per node; 0: ranks on CPUs."""
    ranks: Integer | None = Field(default=None, gt=0)
    """Ranks per node; default: one per GPU, or one on a CPU."""
    directory: PathText | None = None
    """Working directory of the job, on a file system that all nodes share; default: the one in which `longctx launch`
    runs. Relative paths of the recipe and `runs/` are in it."""
    setup: tuple[str, ...] = ()
    """Lines of the job's script before longctx starts: modules, environments. Each is a command of its own; one that
    fails ends the job, unless `|| true` is behind it."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank."""
    program: str = Field(default="longctx", min_length=1)
    """The command `longctx` on the nodes, such as the path of one in a virtual environment."""

    @field_validator("environment")
    @classmethod
    def _names_are_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} cannot name an environment variable: use letters, digits and '_'")
        return environment

    @field_validator("setup", "environment")
    @classmethod
    def _one_line_each(cls, values: tuple[str, ...] | dict[str, str]) -> tuple[str, ...] | dict[str, str]:
        for text in values.values() if isinstance(values, dict) else values:
            if "\n" in text:
                raise ValueError(f"{text[:40]!r} has several lines; give one line per string")
        return values

    @property
    def node_count(self) -> int:
        """Nodes of the job."""
        return self.nodes

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node."""
        return self.ranks or self.gpus or 1


class LocalProfile(Profile):
    """Ranks on this machine, as `longctx train` starts them."""

    executor: Literal["local"]

    @model_validator(mode="after")
    def _one_node(self) -> Self:
        if self.nodes > 1:
            raise ValueError(f"nodes: {self.nodes} nodes need another executor; this one is this machine")
        return self


class SlurmProfile(Profile):
    """A batch job of Slurm (sbatch)."""

    executor: Literal["slurm"]
    account: str | None = None
    """--account of sbatch."""
    partition: str | None = None
    """--partition."""
    qos: str | None = None
    """--qos."""
    constraint: str | None = None
    """--constraint: features of nodes."""
    reservation: str | None = None
    """--reservation."""
    time: Duration | None = Field(default=None, gt=0)
    """Time limit, `"24h"`; default: the partition's."""
    cpus: Integer | None = Field(default=None, gt=0)
    """CPU cores per rank (--cpus-per-task)."""
    memory: str | None = None
    """Memory per node (--mem), such as "512G", or "0" for all of it."""
    exclusive: bool = False
    """Whether the job has its nodes for itself."""
    container: str | None = None
    """Container image of the ranks (pyxis: srun --container-image)."""
    mounts: tuple[str, ...] = ()
    """Mounts of the container, SOURCE:TARGET[:OPTIONS]."""
    requeue: bool = True
    """Whether a job that a signal stopped before the end of its run, as at the time limit or when it is preempted, is
    queued again, and goes on from its checkpoint."""
    stop_before: Duration | None = Field(default=None, gt=0)
    """Time before the limit at which the ranks are told to save and stop; default: the recipe's parallel.timeout,
    within which a step and a save end, or half of `time` if that is less."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as "--switches=1"."""

    @model_validator(mode="after")
    def _container_of_mounts(self) -> Self:
        if self.mounts and self.container is None:
            raise ValueError("mounts: are those of a container; give container too")
        return self


class SshProfile(Profile):
    """Hosts that are reached by ssh, supervised from here; `nodes` is their number."""

    executor: Literal["ssh"]
    hosts: tuple[str, ...] = Field(min_length=1)
    """Arguments of ssh, `host` or `user@host`; rank 0 runs on the first."""
    address: str | None = None
    """Address at which the others reach the first host; default: its name here."""
    port: Integer = Field(default=29500, gt=0, lt=2**16)
    """Port of rank 0."""
    options: tuple[str, ...] = ()
    """Further options of ssh, such as "-i" and a file."""

    @model_validator(mode="after")
    def _nodes_are_hosts(self) -> Self:
        if "nodes" in self.model_fields_set and self.nodes != len(self.hosts):
            raise ValueError(f"nodes: there are {len(self.hosts)} hosts; omit nodes, or give as many hosts")
        return self

    @property
    def node_count(self) -> int:
        """Nodes: one per host."""
        return len(self.hosts)


class KubernetesProfile(Profile):
    """A Kubeflow TrainJob, or a JobSet where there is no trainer."""

    executor: Literal["kubernetes"]
    kind: Literal["trainjob", "jobset"] = "trainjob"
    """`trainjob`: Kubeflow Trainer 2.3 or later. `jobset`: JobSet, without the trainer."""
    namespace: str = "default"
    """Namespace of the job."""
    image: str
    """Container image with longctx, such as one built from the Dockerfile."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime of a TrainJob."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the GPUs as a resource."""
    cpus: str | None = None
    """CPUs per node, such as "32"."""
    memory: str | None = None
    """Memory per node, such as "512Gi"."""
    volumes: dict[str, str] = Field(default_factory=dict)
    """Persistent volume claims by the path at which they are mounted: corpus and run directory."""
    queue: str | None = None
    """Kueue's local queue."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes."""
    service_account: str | None = None
    """Service account of the pods."""
    retries: Integer = Field(default=3, ge=0)
    """Restarts of a JobSet whose pods fail; the runtime says how often a TrainJob restarts."""


class SkyPilotProfile(Profile):
    """A SkyPilot task."""

    executor: Literal["skypilot"]
    accelerator: str | None = None
    """Name of the GPU, such as "H100"; `gpus` of them per node."""
    infra: str | None = None
    """Where: "aws", "gcp/us-central1", "k8s/my-context"; default: the cheapest."""
    image: str | None = None
    """Image, such as "docker:registry/longctx:0.2"."""
    spot: bool = False
    """Whether the nodes may be preempted."""
    managed: bool = True
    """Whether it is a managed job, which is started again after a preemption, or a cluster of its own."""
    disk: Integer | None = Field(default=None, gt=0)
    """Disk per node in GB."""
    mounts: dict[str, str] = Field(default_factory=dict)
    """Buckets or local folders by the path at which they are mounted: corpus and run directory."""

    @model_validator(mode="after")
    def _gpus_have_a_name(self) -> Self:
        if bool(self.gpus) != bool(self.accelerator):
            raise ValueError("accelerator: gpus and accelerator belong together; give both, or neither")
        return self


AnyProfile = LocalProfile | SlurmProfile | SshProfile | KubernetesProfile | SkyPilotProfile
PROFILES: dict[str, type[AnyProfile]] = {
    "local": LocalProfile,
    "slurm": SlurmProfile,
    "ssh": SshProfile,
    "kubernetes": KubernetesProfile,
    "skypilot": SkyPilotProfile,
}
"""Classes of profiles by executor."""


def load_profile(name: str, file: Path | None = None, overrides: Sequence[str] = ()) -> AnyProfile:
    """Read the profile `name` from `file`, with the `key=value` overrides.

    Without a file: from the first that has it of `clusters.toml` in the working directory and its parents, and
    `longctx/clusters.toml` in the user's configuration folder. The name `local` needs no file.

    Raises UserError that lists every mistake with its file and line.
    """
    files = [file] if file is not None else [path for path in _places() if path.is_file()]
    known: list[str] = []
    for path in files:
        merged = read_merged(Path(os.path.abspath(path)))
        if name in merged.data:
            return _validated(_table(merged, name, (), path), name, overrides)
        known += merged.data
    if name == "local" and file is None:
        return _validated(MergedConfig({"executor": "local"}, {(): Origin("the profile local")}), name, overrides)
    where = str(file) if file is not None else " and ".join(map(str, files))
    if not where:
        places = " and ".join(map(str, (_places()[0], _places()[-1])))
        raise UserError(f"--profile {name}: there is no {FILE_NAME}: write one ({places} are read), or give --profiles")
    raise UserError(f"--profile {name}: {where} has no such profile (it has {', '.join(known) or 'none'})")


def _places() -> list[Path]:
    here = Path.cwd()
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [*(folder / FILE_NAME for folder in (here, *here.parents)), configuration / "longctx" / FILE_NAME]


def _table(merged: MergedConfig, name: str, children: tuple[str, ...], path: Path) -> MergedConfig:
    """Return the profile `name` of a file, with what it extends; `children` are the profiles that extend it."""
    place = merged.origin((name,))
    table = merged.data[name]
    if not isinstance(table, dict):
        raise UserError(f"{place}: {name}: should be a table, [{name}], of a profile's keys")
    origins = {key[1:]: origin for key, origin in merged.origins.items() if key[:1] == (name,)}
    data = {key: value for key, value in table.items() if key != "extends"}
    if "extends" not in table:
        return MergedConfig(data, origins)
    parent, origin = table["extends"], origins.pop(("extends",))
    if parent not in merged.data:
        raise UserError(f"{origin}: extends: {path} has no profile {parent!r}")
    if parent in (*children, name):
        circle = " → ".join((*children, name, parent))
        raise UserError(f"{origin}: extends: profiles extend each other in a cycle: {circle}")
    base = _table(merged, parent, (*children, name), path)
    return MergedConfig(merge_tables(base.data, data), base.origins | origins)


def _validated(merged: MergedConfig, name: str, overrides: Sequence[str]) -> AnyProfile:
    for text in overrides:
        override(merged, text)
    executor = merged.data.get("executor")
    if executor not in PROFILES:
        key = ("executor",)
        place = merged.origin(key) if key in merged.origins else merged.origin(())
        what = "missing" if executor is None else f"{executor!r} is none"
        raise UserError(f"{place}: {name}.executor: {what}: give one of {', '.join(PROFILES)}")
    profile: AnyProfile = validated(PROFILES[executor], merged, "profile")
    return profile
