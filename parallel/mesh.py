"""The mesh of ranks: one frozen object, passed explicitly, no module-global groups."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """Ranks as `dp_replicate x dp_shard x cp`, cp innermost (neighbouring ranks split a sequence).

    `sequence` has the axes (dp, cp), dp being dp_replicate x dp_shard. `shard` has the axes over which parameters
    are laid out: (dp_shard_cp,), or (dp_replicate, dp_shard_cp) where whole copies are kept.
    """

    sequence: DeviceMesh
    shard: DeviceMesh
    dp_replicate: int
    dp_shard: int
    cp: int

    @classmethod
    def build(cls, device_type: str, *, dp_replicate: int = 1, dp_shard: int = 1, cp: int = 1) -> "Mesh":
        """The mesh over the default process group, which every rank of it has to call.

        Raises ValueError where the sizes do not multiply to the number of ranks.
        """
        ranks = dist.get_world_size()
        product = dp_replicate * dp_shard * cp
        if product != ranks:
            raise ValueError(
                f"mesh: dp_replicate {dp_replicate} x dp_shard {dp_shard} x cp {cp} = {product}, "
                f"but there are {ranks} ranks"
            )
        sequence = init_device_mesh(device_type, (dp_replicate * dp_shard, cp), mesh_dim_names=("dp", "cp"))
        if dp_replicate == 1:
            shard = init_device_mesh(device_type, (dp_shard * cp,), mesh_dim_names=("dp_shard_cp",))
        else:
            names = ("dp_replicate", "dp_shard_cp")
            shard = init_device_mesh(device_type, (dp_replicate, dp_shard * cp), mesh_dim_names=names)
        return cls(sequence, shard, dp_replicate, dp_shard, cp)

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`."""
        return self.sequence.device_type

    @property
    def dp(self) -> int:
        """Groups of ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_rank(self) -> int:
        """Which sequences this rank reads."""
        return self.sequence.get_local_rank("dp")

    @property
    def cp_rank(self) -> int:
        """Which part of each sequence this rank holds."""
        return self.sequence.get_local_rank("cp")

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """The ranks that split this rank's sequences."""
        return self.sequence.get_group("cp")
