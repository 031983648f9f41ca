"""One training in several processes, started by ``torchrun``: each computes its share of an update's batches.

Process 0 also evaluates, writes and speaks. Every process reads the same files, so they must share a file system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a training, and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def sum(self, *values: float) -> list[float]:
        """Of each value over the processes, the same bits everywhere."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.tolist()

    def from_first(self, *values: float) -> list[float]:
        """What process 0 passed."""
        return self.sum(*(values if self.is_first else [0.0] * len(values)))

    def share(self, module: nn.Module) -> nn.Module:
        """The module with gradients that are the mean over the processes after each backward pass."""
        return DistributedDataParallel(module) if self.size > 1 else module


def keep_gradients_here(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, gradients gather in this process and are not yet shared."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun made, by its environment variables; a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
