"""Device mesh: data, context, tensor, expert and pipeline parallel groups in one frozen object, passed explicitly."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Grid:
    """A cp group as ulysses x ring: neighbouring ranks form Ulysses groups; ranks with equal Ulysses rank form rings.

    cp rank `i * ulysses + j` has rank j in its Ulysses group and rank i in its ring. Groups of one rank are None.
    """

    ulysses: int
    ulysses_group: ProcessGroup | None
    ring_group: ProcessGroup | None


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh: its size, this rank's rank in it, and its process group (None if the size is 1)."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    @classmethod
    def from_group(cls, group: ProcessGroup | None) -> "Axis":
        """Return the axis of an existing process group; None is a group of one rank."""
        if group is None or dist.get_world_size(group) == 1:
            return cls()
        return cls(dist.get_world_size(group), dist.get_rank(group), group)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, name: str) -> "Axis":
        """Return the axis of a DeviceMesh dim."""
        return cls.from_group(mesh.get_group(name))


@dataclass(frozen=True)
class Mesh:
    """Ranks as `dp_replicate x dp_shard x cp x tp`, where cp is `ring x ulysses` and tp is innermost.

    dp ranks read different sequences, cp ranks split each sequence, tp ranks split heads and channels. ep ranks split
    the experts: neighbours within `dp_shard x cp`, which exchange tokens. `shard` is the FSDP mesh of the parameters,
    (dp_shard_cp,) or for HSDP (dp_replicate, dp_shard_cp); None if another framework shards them. Expert parameters are
    split over `expert_axis` (ep,), then sharded over `expert_shard`, (rest,) or (dp_replicate, rest), where rest x ep
    is dp_shard x cp; both are None if ep is 1.
    """

    device_type: str
    dp: Axis
    cp: Axis
    tp: Axis = Axis()
    ep: Axis = Axis()
    pp: Axis = Axis()
    """Pipeline stages: ranks with different layers. Only set by other frameworks."""
    ulysses: Axis = Axis()
    ring: Axis = Axis()
    dp_replicate: int = 1
    dp_shard: int = 1
    shard: DeviceMesh | None = None
    expert_axis: DeviceMesh | None = None
    expert_shard: DeviceMesh | None = None
    tokens: ProcessGroup | None = None
    """The group dp x cp, over which a step's tokens are sharded, for sums over tokens; None: all ranks."""
    virtual: tuple["Mesh", ...] = ()
    """The meshes of the virtual ranks that this process hosts (`longctx.parallel.virtual_ranks`), if there are any."""

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
        """Build the mesh over the default process group; every rank has to call it.

        Raises ValueError, with the arithmetic, if the product of the sizes is not the number of ranks, `ulysses` does
        not divide cp, or `ep` does not divide dp_shard x cp.
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
                f"{dp_shard * cp % ep} ranks would be left over"
            )
        dp, both = dp_replicate * dp_shard, dp_shard * cp

        def view(**axes: int) -> DeviceMesh:
            return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

        sequence = view(dp=dp, cp=cp, tp=tp)
        cp_axis = Axis.from_mesh(sequence, "cp")
        ulysses_axis, ring_axis, ep_axis = Axis(), cp_axis, Axis()
        expert_axis = expert_shard = None
        if ulysses > 1:
            split = view(dp=dp, ring=cp // ulysses, ulysses=ulysses, tp=tp)
            ulysses_axis, ring_axis = Axis.from_mesh(split, "ulysses"), Axis.from_mesh(split, "ring")
        if ep > 1:
            experts = view(dp_replicate=dp_replicate, rest=both // ep, ep=ep, tp=tp)
            ep_axis, expert_axis = Axis.from_mesh(experts, "ep"), experts["ep"]
            expert_shard = experts["rest"] if dp_replicate == 1 else experts["dp_replicate", "rest"]
        parameters = view(dp_replicate=dp_replicate, dp_shard_cp=both, tp=tp)
        return cls(
            device_type,
            dp=Axis.from_mesh(sequence, "dp"),
            cp=cp_axis,
            tp=Axis.from_mesh(sequence, "tp"),
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
    def from_groups(
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
        """Build the mesh from another framework's process groups, those that this rank is in; None: one rank.

        `ulysses` and `ring` (both or neither) split `cp` as in `Grid`; `tokens` is the group of dp x cp. Raises
        ValueError if `ulysses` x `ring` is not `cp` in that order.
        """
        groups = {"cp": cp, "dp": dp, "tp": tp, "ep": ep, "pp": pp, "ulysses": ulysses, "ring": ring}
        axes: dict[str, Any] = {name: Axis.from_group(group) for name, group in groups.items()}
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
                    f"cp group {ranks} is split into Ulysses groups of {u.size} neighbouring ranks"
                )

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return torch.device(self.device_type, torch.cuda.current_device() if self.device_type == "cuda" else 0)

    @property
    def grid(self) -> Grid | None:
        """The cp group as ulysses x ring; None if it is not split."""
        if self.ulysses.size == 1:
            return None
        return Grid(self.ulysses.size, self.ulysses.group, self.ring.group)
