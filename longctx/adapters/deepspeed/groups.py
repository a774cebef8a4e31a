"""Process groups of a mesh as DeepSpeed's `mpu` object.

With a mesh given by sizes (`mesh_param`, or keys of its config) DeepSpeed 0.19.8 never reduces gradients over the
sequence-parallel ranks in ZeRO stages 0, 1 and 2, so parameters drift apart; with an `mpu` it does.
"""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from longctx.parallel.mesh import Axis, Mesh


def _single_rank_group() -> ProcessGroup:
    """Create a group of only this rank."""
    group: ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True, group_desc="single rank")
    return group


class Groups:
    """DeepSpeed's `mpu` for a mesh: data parallel = dp, sequence parallel = cp, model parallel = one rank.

    Gradients are reduced, and parameters partitioned, over dp x cp (the sequence-data-parallel group). Raises
    ValueError if the mesh has tensor parallelism or does not contain all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        ranks = mesh.dp.size * mesh.cp.size
        if mesh.tp.size > 1:
            raise ValueError(f"DeepSpeed: tp is {mesh.tp.size}: expected 1, tensor parallelism is not supported")
        if ranks != dist.get_world_size():
            raise ValueError(
                f"DeepSpeed: dp {mesh.dp.size} x cp {mesh.cp.size} = {ranks}, but there are {dist.get_world_size()} "
                "ranks"
            )
        single = _single_rank_group()
        self._model = Axis(1, 0, single)
        self._data, self._sequence = (
            Axis(axis.size, axis.rank, single if axis.group is None else axis.group) for axis in (mesh.dp, mesh.cp)
        )
        world: ProcessGroup = dist.group.WORLD  # type: ignore[assignment]  # not None: the process group exists
        self._sequence_data = Axis(ranks, dist.get_rank(), world)

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
        return self._sequence_data.group

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._sequence_data.size

    def get_sequence_data_parallel_rank(self) -> int:
        return self._sequence_data.rank

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self._model.group

    def get_model_parallel_world_size(self) -> int:
        return self._model.size

    def get_model_parallel_rank(self) -> int:
        return self._model.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
