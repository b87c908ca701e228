"""Lightning strategies whose defaults fit the contract."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes: parameters, gradients and optimiser state are sharded, checkpoints are single files.

    Lightning's ``data_parallel_size: auto`` means the number of nodes; here it means every process there is.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Set the mesh to one data-parallel dimension over the whole world."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
