"""DeepSpeed's groups, of a mesh: the object `mpu` that it asks for them.

A mesh given to DeepSpeed by sizes (`mesh_param`, or keys of its configuration) is never reduced over by ZeRO 0, 1 and 2
(0.19.8), so that parameters drift apart; groups asked of an object are.
"""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from longctx.parallel.mesh import Axis, Mesh


def _alone() -> ProcessGroup:
    """A group of this rank alone."""
    group: ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True, group_desc="alone")
    return group


class Groups:
    """The data-parallel axis of a mesh, its context-parallel one, which DeepSpeed calls sequence parallel, and both
    together, over which gradients are summed and parameters divided; tensor parallelism is of one rank.

    Raises ValueError where a mesh has tensor parallelism, or does not hold all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        ranks = mesh.dp.size * mesh.cp.size
        if mesh.tp.size > 1:
            raise ValueError(f"DeepSpeed: tp {mesh.tp.size}: its ranks divide sequences and parameters, not heads")
        if ranks != dist.get_world_size():
            raise ValueError(
                f"DeepSpeed: dp {mesh.dp.size} x cp {mesh.cp.size} = {ranks}, and there are {dist.get_world_size()} "
                "ranks"
            )
        alone = _alone()
        self._tensor = Axis(1, 0, alone)
        self._data, self._sequence = (
            Axis(axis.size, axis.rank, alone if axis.group is None else axis.group) for axis in (mesh.dp, mesh.cp)
        )
        world: ProcessGroup = dist.group.WORLD  # type: ignore[assignment]  # of a process group that exists
        self._both = Axis(ranks, dist.get_rank(), world)

    def get_data_parallel_group(self) -> ProcessGroup | None:
        return self._data.group

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data.group)

    def get_sequence_parallel_group(self) -> ProcessGroup | None:
        return self._sequence.group

    def get_sequence_parallel_world_size(self) -> int:
        return self._sequence.size

    def get_sequence_parallel_rank(self) -> int:
        return self._sequence.rank

    def get_sequence_data_parallel_group(self) -> ProcessGroup | None:
        return self._both.group

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._both.size

    def get_sequence_data_parallel_rank(self) -> int:
        return self._both.rank

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self._tensor.group

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
