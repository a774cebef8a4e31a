"""The mesh of ranks: one frozen object, passed explicitly, no module-global groups."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Grid:
    """The ranks of a cp group as ulysses x ring: neighbours in a group change heads for tokens, groups form rings.

    cp rank `i * ulysses + j` is number j of its Ulysses group and number i of its ring. A group is None where it has
    one rank.
    """

    ulysses: int
    ulysses_group: ProcessGroup | None
    ring_group: ProcessGroup | None


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh, as this rank sees it: its size, this rank's place, and the group, None for one rank."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, group: ProcessGroup | None) -> "Axis":
        """The axis of a group that exists."""
        if group is None or dist.get_world_size(group) == 1:
            return cls()
        return cls(dist.get_world_size(group), dist.get_rank(group), group)

    @classmethod
    def named(cls, mesh: DeviceMesh, name: str) -> "Axis":
        """An axis of a DeviceMesh."""
        return cls.of(mesh.get_group(name))


@dataclass(frozen=True)
class Mesh:
    """Ranks as `dp_replicate x dp_shard x cp x tp`, cp being `ring x ulysses` and tp innermost.

    dp ranks read different sequences, cp ranks split a sequence, tp ranks split heads and channels. `ep` ranks divide
    experts between them: neighbours among `dp_shard x cp`, whose tokens they exchange. `shard` has the axes over which
    parameters are laid out, (dp_shard_cp,), or (dp_replicate, dp_shard_cp) where whole copies are kept; None where
    another framework lays them out. Those of experts are divided over `expert_axis` (ep,) and then laid out over
    `expert_shard`, (rest,) or (dp_replicate, rest), rest x ep being dp_shard x cp; None where ep is 1.
    """

    device_type: str
    dp: Axis
    cp: Axis
    tp: Axis = Axis()
    ep: Axis = Axis()
    pp: Axis = Axis()
    """Ranks that have different layers, the stages of a pipeline: of another framework."""
    ulysses: Axis = Axis()
    ring: Axis = Axis()
    dp_replicate: int = 1
    dp_shard: int = 1
    shard: DeviceMesh | None = None
    expert_axis: DeviceMesh | None = None
    expert_shard: DeviceMesh | None = None
    tokens: ProcessGroup | None = None
    """The ranks that together hold the tokens of a step, dp x cp, for sums over them; None: all ranks."""

    @classmethod
    def build(
        cls,
        device_type: str,
        *,
        dp_replicate: int = 1,
        dp_shard: int = 1,
        cp: int = 1,
        ulysses: int = 1,
        tp: int = 1,
        ep: int = 1,
    ) -> "Mesh":
        """The mesh over the default process group, which every rank of it has to call.

        Raises ValueError, with the arithmetic, where the sizes do not multiply to the number of ranks, or `ulysses`
        does not divide cp, or `ep` does not divide dp_shard x cp.
        """
        sizes = {
            "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "ulysses": ulysses, "tp": tp, "ep": ep,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"mesh: {name} is {size}: expected at least 1")
        ranks = dist.get_world_size()
        product = dp_replicate * dp_shard * cp * tp
        if product != ranks:
            raise ValueError(
                f"mesh: dp_replicate {dp_replicate} x dp_shard {dp_shard} x cp {cp} x tp {tp} = {product}, "
                f"but there are {ranks} ranks"
            )
        if cp % ulysses:
            raise ValueError(f"mesh: cp {cp} is not ulysses {ulysses} x ring: {cp} / {ulysses} leaves {cp % ulysses}")
        if dp_shard * cp % ep:
            raise ValueError(
                f"mesh: ep {ep} does not divide dp_shard {dp_shard} x cp {cp} = {dp_shard * cp}: "
                f"{dp_shard * cp % ep} ranks would be left"
            )
        dp, both = dp_replicate * dp_shard, dp_shard * cp

        def view(**axes: int) -> DeviceMesh:
            return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

        sequence = view(dp=dp, cp=cp, tp=tp)
        cp_axis = Axis.named(sequence, "cp")
        ulysses_axis, ring_axis, ep_axis = Axis(), cp_axis, Axis()
        expert_axis = expert_shard = None
        if ulysses > 1:
            split = view(dp=dp, ring=cp // ulysses, ulysses=ulysses, tp=tp)
            ulysses_axis, ring_axis = Axis.named(split, "ulysses"), Axis.named(split, "ring")
        if ep > 1:
            experts = view(dp_replicate=dp_replicate, rest=both // ep, ep=ep, tp=tp)
            ep_axis, expert_axis = Axis.named(experts, "ep"), experts["ep"]
            expert_shard = experts["rest"] if dp_replicate == 1 else experts["dp_replicate", "rest"]
        parameters = view(dp_replicate=dp_replicate, dp_shard_cp=both, tp=tp)
        return cls(
            device_type,
            dp=Axis.named(sequence, "dp"),
            cp=cp_axis,
            tp=Axis.named(sequence, "tp"),
            ep=ep_axis,
            ulysses=ulysses_axis,
            ring=ring_axis,
            dp_replicate=dp_replicate,
            dp_shard=dp_shard,
            shard=parameters["dp_shard_cp"] if dp_replicate == 1 else parameters["dp_replicate", "dp_shard_cp"],
            expert_axis=expert_axis,
            expert_shard=expert_shard,
        )

    @classmethod
    def of_groups(
        cls,
        device_type: str,
        *,
        cp: ProcessGroup | None = None,
        dp: ProcessGroup | None = None,
        tp: ProcessGroup | None = None,
        ep: ProcessGroup | None = None,
        pp: ProcessGroup | None = None,
        ulysses: ProcessGroup | None = None,
        ring: ProcessGroup | None = None,
        tokens: ProcessGroup | None = None,
    ) -> "Mesh":
        """The mesh of groups that another framework has made, as this rank is in them; None is a group of one rank.

        `ulysses` and `ring`, both or neither, divide `cp` as in `Grid`; `tokens` has the ranks of dp x cp. Raises
        ValueError where they do not divide it so.
        """
        groups = {"cp": cp, "dp": dp, "tp": tp, "ep": ep, "pp": pp, "ulysses": ulysses, "ring": ring}
        axes: dict[str, Any] = {name: Axis.of(group) for name, group in groups.items()}
        mesh = cls(device_type, **axes, dp_shard=axes["dp"].size, tokens=tokens)
        if ulysses is not None or ring is not None:
            mesh._check_grid()
        return mesh

    def _check_grid(self) -> None:
        u, r, c = self.ulysses, self.ring, self.cp
        if u.size * r.size != c.size:
            raise ValueError(f"mesh: ulysses {u.size} x ring {r.size} = {u.size * r.size}, but cp has {c.size} ranks")
        if c.group is None:
            return
        ranks = dist.get_process_group_ranks(c.group)
        for name, axis, want in (
            ("ulysses", u, ranks[c.rank - c.rank % u.size :][: u.size]),
            ("ring", r, ranks[c.rank % u.size :: u.size]),
        ):
            got = [ranks[c.rank]] if axis.group is None else dist.get_process_group_ranks(axis.group)
            if got != want:
                raise ValueError(
                    f"mesh: the {name} group of rank {ranks[c.rank]} has the ranks {got}: expected {want}, since the "
                    f"cp group {ranks} is divided into Ulysses groups of {u.size} neighbours"
                )

    @property
    def device(self) -> torch.device:
        """This rank's."""
        return torch.device(self.device_type, torch.cuda.current_device() if self.device_type == "cuda" else 0)

    @property
    def grid(self) -> Grid | None:
        """The cp ranks as ulysses x ring; None where they are not divided."""
        if self.ulysses.size == 1:
            return None
        return Grid(self.ulysses.size, self.ulysses.group, self.ring.group)
