"""How far a training has come, on the disk: enough to go on bit for bit.

``last.safetensors`` holds the newest state and ``previous.safetensors`` the one before it. Both carry the SHA-256 of their
tensors, so that damage which leaves the file readable is seen too. Random numbers need no state: each batch seeds its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from model.checkpoint import STATE, RunError, fill_model, read_tensors
from model.distributed import share_like
from model.files import write_atomically
from model.transformer import Transformer

NEWEST_FIRST = ("last.safetensors", "previous.safetensors")


@dataclass(slots=True)
class Progress:
    """Together with the tensors beside it, all there is to know."""

    update: int = 0
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done."""
    seconds: float = 0.0
    """Spent training, interruptions not counted."""
    tokens: int = 0
    """Labels learned from."""
    best: list[float] = field(default_factory=list)
    """``Validation.rank`` of the best evaluation; empty before the first."""
    evaluations_since_best: int = 0
    precision: str = "fp32"
    started: str = ""
    started_from: str = ""
    """sha256 of the weights training began with; empty: random ones."""
    inputs: dict[str, str] = field(default_factory=dict)
    """sha256 of the tokenizer and of every file of the corpus: a run goes on with the same ones or not at all."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its state, by names that ``restore_optimizer`` knows."""
    return {
        f"{STATE}optimizer/{index}/{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def save_progress(weights: dict[str, Tensor], optimizer: dict[str, Tensor], progress: Progress, directory: Path) -> None:
    """One file, so that weights, optimiser and position always belong together. The file before it is kept.

    Args:
        optimizer: from ``optimizer_tensors``.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (weights | optimizer).items()}
    content = save(tensors, {"progress": json.dumps(asdict(progress)), "sha256": _digest(tensors)})
    newest, previous = (directory / name for name in NEWEST_FIRST)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        if newest.exists():
            newest.replace(previous)

    write_atomically(newest, write)


def read_progress(directory: Path, warn: Callable[[str], object]) -> tuple[Progress, dict[str, Tensor]]:
    """The newest checkpoint that is whole; ``warn`` is told of one that is passed over.

    Raises:
        RunError: there is none.
    """
    present = [directory / name for name in NEWEST_FIRST if (directory / name).exists()]
    if not present:
        raise RunError(f"{directory}: stopped before its first checkpoint: nothing to resume, start again with --force")
    damage: list[str] = []
    for path in present:
        try:
            progress, tensors = _read(path)
        except RunError as error:
            damage.append(str(error))
            continue
        if damage:
            warn(f"warning: {damage[0]}; going on from {path.name}, update {progress.update:,}")
        return progress, tensors
    raise RunError("; ".join(damage))


def _read(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    tensors = read_tensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata["sha256"] != _digest(tensors):
            raise RunError(f"{path}: damaged: its tensors are not those that were written")
        return Progress(**json.loads(metadata["progress"])), tensors
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: does not hold the state of a training: {error}") from error


def restore_weights(model: Transformer, tensors: dict[str, Tensor], origin: Path) -> None:
    """Puts the model back to where ``save_progress`` saw it. Raises RunError if it is of another shape."""
    fill_model(model, {name: tensor for name, tensor in tensors.items() if not name.startswith(STATE)}, origin)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The same for an optimiser of the restored model."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(STATE):
            index, key = name.removeprefix(f"{STATE}optimizer/").split("/")
            state.setdefault(int(index), {})[key] = share_like(tensor, parameters[int(index)])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
