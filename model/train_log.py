"""What a person sees of training: a progress bar, and a log of JSON lines."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from model.files import write_json_lines
from model.scalars import Scalars


class TrainLog:
    """log.jsonl holds one line for each update and one for each evaluation; the bar shows the latest of both."""

    def __init__(
        self, path: Path, total_updates: int, resume_at: int | None, console: Console, scalars: Scalars | None = None
    ) -> None:
        """Args: ``resume_at``: keep the lines up to this update and go on from there; None starts a new log."""
        kept = [] if resume_at is None else [entry for entry in read_log(path) if entry["update"] <= resume_at]
        write_json_lines(path, kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # whole lines, at once
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=total_updates, completed=resume_at or 0, left="?")
        self._loss: float | None = None

        self._scalars = scalars
        self._bar.start()

    def close(self) -> None:
        self._bar.stop()
        with suppress(OSError):  # a full disk has been reported by the write that met it
            self._file.close()
        if self._scalars:
            self._scalars.close()

    def update(self, entry: dict[str, Any], tokens_per_second: float, seconds_left: float) -> None:
        self._write(entry)
        self._loss = entry["loss"] if self._loss is None else 0.95 * self._loss + 0.05 * entry["loss"]
        self._bar.update(
            self._task,
            completed=entry["update"],
            description=f"epoch {entry['epoch']} · loss {self._loss:.3f} · {tokens_per_second:,.0f} tokens/s",
            left=f"{seconds_left // 60:.0f}:{seconds_left % 60:02.0f}",
        )

    def evaluation(self, entry: dict[str, Any], better: bool) -> None:
        self._write(entry)
        error = f" · {entry['validation_error']:.1%} wrong" if "validation_error" in entry else ""
        mark = " (best)" if better else ""
        self.say(
            f"update {entry['update']:>6,} · epoch {entry['epoch']} · validation loss {entry['validation_loss']:.4f}"
            f"{error}{mark} · {entry['seconds']:.0f} s"
        )

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        if self._scalars:
            self._scalars.add(entry)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of log.jsonl; what a crash cut off is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
