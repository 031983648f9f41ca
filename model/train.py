"""The training loop.

An *update* is one step of the optimiser, on the gradients of ``accumulate`` batches. Every ``evaluate_every`` updates, or at
the end of each epoch, the model is evaluated and everything is saved: a run that was stopped goes on exactly from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from model.batches import Batch, Epoch
from model.checkpoint import (
    Progress,
    Run,
    average_weights,
    load_progress,
    load_run,
    load_weights,
    save_progress,
    save_weights,
    write_record,
)
from model.claim import claim_directory
from model.device import PRECISIONS, describe_machine, keep_freed_memory, pick_device, pick_precision
from model.evaluate import evaluate_run
from model.files import write_json_lines, write_text
from model.objective import training_loss, validate
from model.optim import make_optimizer
from model.prepare import Prepared, prepare
from model.recipe import Recipe
from model.schedule import learning_rate
from model.tokenizer import Tokenizer
from model.train_log import TrainLog, plot_loss
from model.transformer import Transformer


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved last is intact."""


CALIBRATION_EXAMPLES = 256
"""Training examples kept beside the model, from which eight-bit graphs take their scales."""


def train(recipe: Recipe, out: Path, *, resume: bool = False, force: bool = False, console: Console | None = None) -> Run:
    """Trains ``recipe`` into the directory ``out`` and returns the finished run.

    Raises:
        RunError: ``out`` exists (without ``resume`` or ``force``), or does not fit the recipe (with ``resume``).
        DataError, TokenizerError: for a corpus that cannot be used.
        TrainingError: the device is not there, or the loss is no number any more.
    """
    claim_directory(out, recipe, resume=resume, force=force)
    try:
        device = pick_device(recipe.training.device)
    except RuntimeError as error:
        raise TrainingError(str(error)) from error
    if device.type == "cpu":
        keep_freed_memory()
    prepared = prepare(recipe, Tokenizer.load(out / "tokenizer.json") if resume else None)
    torch.manual_seed(recipe.training.seed)
    model = Transformer(recipe.model_config(prepared.tokenizer.vocab_size)).to(device).train()
    optimizer = make_optimizer(model, recipe.training)
    if resume:
        progress = load_progress(model, optimizer, out / "last.safetensors")
    else:
        progress = Progress(
            started=datetime.now(UTC).isoformat(timespec="seconds"), precision=pick_precision(recipe.training.precision, device)
        )
        out.mkdir(parents=True, exist_ok=True)
        prepared.tokenizer.save(out / "tokenizer.json")
        write_json_lines(out / "held_out.jsonl", prepared.held_out)
        some = prepared.train.examples(0)[:CALIBRATION_EXAMPLES]
        write_json_lines(out / "calibration.jsonl", [{"input": list(e.input), "output": list(e.output)} for e in some])
    write_text(out / "recipe.toml", recipe.to_toml())
    log = TrainLog(
        out / "log.jsonl", recipe.training.max_updates, progress.update if resume else None, console or Console(stderr=True)
    )
    trainer = Trainer(
        recipe=recipe, prepared=prepared, out=out, device=device, model=model, optimizer=optimizer, progress=progress, log=log
    )
    with log:
        trainer.run()
    return trainer.finish()


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run: a model, an optimiser, and how far they have come."""

    recipe: Recipe
    prepared: Prepared
    out: Path
    device: torch.device
    model: Transformer
    optimizer: torch.optim.Optimizer
    progress: Progress
    log: TrainLog
    validation: Epoch = field(init=False)
    seconds_before: float = field(init=False)
    """Spent in earlier sessions of this run."""
    session_begin: float = field(init=False)

    def run(self) -> None:
        """Updates until one of the recipe's limits is reached."""
        self.validation = self.prepared.validation.epoch(0)
        self.seconds_before, self.session_begin = self.progress.seconds, time.monotonic()
        if not self.progress.update:
            self._introduce()
        while not self._is_over():
            self._run_epoch()
        self.log.say(f"stopped after {self.progress.update:,} updates: {self._is_over()}")

    def finish(self) -> Run:
        """Averages checkpoints if the recipe says so, measures the task's metric, records it and draws the curve."""
        self._write_average()
        run = load_run(self.out)
        run.model.to(self.device)
        metrics = evaluate_run(run)
        for name, value in metrics.items():
            self.log.say(f"{name}: {value:.4f}")
        self._write_record(metrics)
        plot_loss(self.out / "log.jsonl", self.out / "loss.png", self.recipe.task.name)
        return load_run(self.out)

    def _run_epoch(self) -> None:
        progress, every = self.progress, self.recipe.training.evaluate_every
        epoch = self.prepared.train.epoch(progress.epoch)
        for batches in self._groups(epoch):
            self._update(batches)
            progress.batch += len(batches)
            if progress.batch == len(epoch):
                progress.epoch, progress.batch = progress.epoch + 1, 0
            over = self._is_over()
            if over or (progress.update % every == 0 if every else progress.batch == 0):
                self._evaluate()
            if over or self._is_over():
                return

    def _groups(self, epoch: Epoch) -> Iterator[list[Batch]]:
        """The batches of each update, from where the epoch was left."""
        size = self.recipe.training.accumulate
        for start in range(self.progress.batch, len(epoch), size):
            yield [epoch[i].to(self.device) for i in range(start, min(start + size, len(epoch)))]

    def _update(self, batches: list[Batch]) -> None:
        progress, settings = self.progress, self.recipe.training
        rate = learning_rate(settings, progress.update + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels, mean_loss = sum(batch.label_count for batch in batches), 0.0
        for batch in batches:
            loss = training_loss(self.model, batch, settings.label_smoothing, PRECISIONS[progress.precision]) / labels
            loss.backward()
            mean_loss += loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm or math.inf).item()
        if not math.isfinite(mean_loss + norm):
            raise TrainingError(
                f"loss {mean_loss:g} and gradient norm {norm:g} at update {progress.update + 1} (learning rate {rate:.2g}): "
                f"lower training.learning_rate, lengthen training.warmup_updates or set training.clip_norm; the checkpoints "
                f"in {self.out} are as the last evaluation left them"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.update += 1
        progress.tokens += labels
        self._read_clock()
        self.log.update(
            {
                "update": progress.update,
                "epoch": progress.epoch,
                "loss": mean_loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 3),
            },
            progress.tokens / progress.seconds,
            self._seconds_left(),
        )

    def _evaluate(self) -> None:
        """Validation; best.safetensors if it is the best so far; last.safetensors and run.json in any case."""
        progress = self.progress
        validation = validate(self.model, self.validation)
        better = not progress.best or validation.rank() < progress.best
        if better:
            progress.best, progress.evaluations_since_best = validation.rank(), 0
            save_weights(self.model.state_dict(), self.out / "best.safetensors")
        else:
            progress.evaluations_since_best += 1
        if self.recipe.training.average_last:
            self._keep_for_average()
        self._read_clock()
        save_progress(self.model, self.optimizer, progress, self.out / "last.safetensors")
        self._write_record({})
        entry = {"update": progress.update, "epoch": progress.epoch, "validation_loss": validation.loss}
        entry |= {} if validation.error is None else {"validation_error": validation.error}
        self.log.evaluation(entry | {"seconds": round(progress.seconds, 3)}, better)

    def _keep_for_average(self) -> None:
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        save_weights(self.model.state_dict(), folder / f"{self.progress.update:08}.safetensors")
        for old in sorted(folder.glob("*.safetensors"))[: -self.recipe.training.average_last]:
            old.unlink()

    def _write_average(self) -> None:
        """average.safetensors. Its output is better than its validation loss: that may be no lower than the best single one."""
        paths = sorted((self.out / "checkpoints").glob("*.safetensors"))
        if len(paths) < 2:
            return
        average = self.out / "average.safetensors"
        save_weights(average_weights(paths), average)
        load_weights(self.model, average)
        loss, best = validate(self.model, self.validation).loss, self.progress.best[-1]
        self.log.say(f"average of {len(paths)} checkpoints: validation loss {loss:.4f}; best single one {best:.4f}")

    def _is_over(self) -> str:
        """Why training is over; empty while it is not."""
        progress, settings = self.progress, self.recipe.training
        if progress.update >= settings.max_updates:
            return "max_updates"
        if settings.max_epochs and progress.epoch >= settings.max_epochs:
            return "max_epochs"
        if settings.max_minutes and progress.seconds >= 60 * settings.max_minutes:
            return "max_minutes"
        if settings.patience and progress.evaluations_since_best >= settings.patience:
            return f"nothing better in {progress.evaluations_since_best} evaluations"
        return ""

    def _read_clock(self) -> None:
        self.progress.seconds = self.seconds_before + time.monotonic() - self.session_begin

    def _seconds_left(self) -> float:
        """By the pace so far, until the first of the limits that can be foreseen."""
        progress, settings = self.progress, self.recipe.training
        left = (settings.max_updates - progress.update) * progress.seconds / progress.update
        if settings.max_minutes:
            left = min(left, 60 * settings.max_minutes - progress.seconds)
        return max(left, 0.0)

    def _introduce(self) -> None:
        epoch = self.prepared.train.epoch(0)
        parameters = sum(p.numel() for p in self.model.parameters())
        left_out = f" ({self.prepared.left_out:,} empty or too long, left out)" if self.prepared.left_out else ""
        self.log.say(
            f"{self.recipe.task.name}: {parameters:,} parameters, vocabulary {self.model.config.vocab_size:,}; "
            f"{len(epoch.examples):,} examples{left_out} in {len(epoch):,} batches an epoch, {epoch.padding():.1%} padding; "
            f"{self.progress.precision} on {describe_machine(self.device)}"
        )

    def _write_record(self, metrics: dict[str, float]) -> None:
        recipe, progress = self.recipe, self.progress
        provenance = {
            "seed": recipe.training.seed,
            "started": progress.started,
            "updates": progress.update,
            "epochs": progress.epoch,
            "seconds": round(progress.seconds, 1),
            "tokens": progress.tokens,
            "tokens_per_second": round(progress.tokens / progress.seconds, 1),
            "machine": describe_machine(self.device),
            "precision": progress.precision,
            "torch": torch.__version__,
            "data": self.prepared.digests,
            "validation_loss": progress.best[-1],
            "metrics": metrics,
        }
        write_record(self.out, self.model.config, asdict(recipe.task), asdict(recipe.generation), provenance)
