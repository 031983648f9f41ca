"""The log of a run as TensorBoard scalars: ``tensorboard --logdir runs`` shows many runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_GROUPS = {"validation_loss": "loss/validation", "loss": "loss/training", "learning_rate": "training/learning_rate",
           "gradient_norm": "training/gradient_norm", "tokens": "training/tokens", "seconds": "training/seconds"}  # fmt: skip


class Scalars:
    """Writes event files into ``directory``. ``resume_at``: TensorBoard forgets what lies after this update."""

    def __init__(self, directory: Path, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and few runs want it

        self._writer = SummaryWriter(str(directory), purge_step=resume_at + 1 if resume_at else None)

    def add(self, entry: dict[str, Any]) -> None:
        """A line of log.jsonl; the task's metric goes by its own name."""
        update = entry["update"]
        for name, value in entry.items():
            if name not in ("update", "epoch"):
                self._writer.add_scalar(_GROUPS.get(name, f"task/{name}"), value, update)

    def close(self) -> None:
        self._writer.close()
