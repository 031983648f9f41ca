"""One training in several processes, started by ``torchrun``: each computes its share of an update's batches.

Either every process holds the whole model (DistributedDataParallel), or each holds a share of every parameter, gradient and
optimiser state, and the layers are put together one at a time as they are needed (FSDP2): for a model that one device cannot
hold. Process 0 also writes and speaks. Every process reads the same files, so they must share a file system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.layers import DecoderLayer, EncoderLayer
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a training, and which of them this is."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Each holds a share of the model, not all of it."""

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

    def place(self, model: Transformer, device: torch.device) -> Transformer:
        """The model on ``device``: all of it, or this process's share. Make the optimiser afterwards."""
        if not self.sharded:
            return model.to(device)
        mesh = init_device_mesh(device.type, (self.size,))
        for layer in model.modules():
            if isinstance(layer, EncoderLayer | DecoderLayer):
                fully_shard(layer, mesh=mesh)
            if isinstance(layer, DecoderLayer):
                register_fsdp_forward_method(layer, "read_source")
        fully_shard(model, mesh=mesh)
        for method in ("features", "classify"):
            register_fsdp_forward_method(model, method)
        return model

    def share(self, loss: nn.Module) -> nn.Module:
        """The module with gradients that are the mean over the processes after each backward pass."""
        return DistributedDataParallel(loss) if self.size > 1 and not self.sharded else loss

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors at process 0, on the CPU if they were sharded. All processes must call it, with the same names."""
        if not self.sharded:
            return tensors
        whole = {}
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_first:
                whole[name] = tensor.cpu()
        return whole


def share_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's share of ``tensor``, if ``model`` is sharded and of the same shape; otherwise ``tensor``."""
    if isinstance(model, DTensor) and tensor.shape == model.shape:
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
    return tensor


def keep_gradients_here(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, gradients gather in this process and are not yet shared."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def join(*, sharded: bool = False) -> Iterator[World]:
    """The world that torchrun made, by its environment variables; a world of one, which needs no shares, without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(distributed.get_rank(), size, sharded)
    finally:
        distributed.destroy_process_group()
