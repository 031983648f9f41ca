"""The training loop.

An *update* is one step of the optimiser, on the gradients of ``accumulate`` batches. Every ``evaluate_every`` updates, or at
the end of each epoch, the model is evaluated and everything is saved: a run that was stopped goes on exactly from there.
Several processes share out the batches of each update, and the curve is that of one.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.batches import Epoch
from model.checkpoint import average_weights, load_run, save_weights, write_record
from model.device import PRECISIONS, describe_machine
from model.distributed import World, keep_gradients_here
from model.evaluate import evaluate_run, greedy_metric
from model.objective import TrainingLoss, Validation, validate
from model.prepare import Prepared
from model.progress import Progress, optimizer_tensors, save_progress
from model.recipe import Recipe
from model.scalars import Scalars
from model.schedule import learning_rate
from model.train_log import TrainLog
from model.transformer import Transformer


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved last is intact."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run: a model, an optimiser, and how far they have come."""

    recipe: Recipe
    prepared: Prepared
    out: Path
    device: torch.device
    world: World
    model: Transformer
    optimizer: torch.optim.Optimizer
    progress: Progress
    log: TrainLog | None = None
    """Process 0 has one."""
    saved: int = field(init=False)
    """Update of the last checkpoint; 0: none."""
    loss: nn.Module = field(init=False)
    """Batch -> summed loss; its gradients are shared over the processes."""
    validation: Epoch = field(init=False)
    seconds_before: float = field(init=False)
    """Spent in earlier sessions of this run."""
    session_begin: float = field(init=False)

    def __post_init__(self) -> None:
        settings, progress = self.recipe.training, self.progress
        self.saved = progress.update
        loss = TrainingLoss(self.model, settings.label_smoothing, PRECISIONS[progress.precision], settings.consistency)
        self.loss = self.world.share(loss)
        self.validation = self.prepared.validation.epoch(0)
        self.seconds_before, self.session_begin = progress.seconds, time.monotonic()

    def open_log(self, console: Console, resume: bool, tensorboard: bool) -> None:
        update = self.progress.update
        scalars = Scalars(self.out / "tensorboard", update) if tensorboard else None
        resume_at = update if resume else None
        self.log = TrainLog(self.out / "log.jsonl", self.recipe.training.max_updates, resume_at, console, scalars)
        if not update:
            self._introduce()

    def close_log(self) -> None:
        if self.log:
            self.log.close()

    def run(self) -> None:
        """Updates until one of the recipe's limits is reached."""
        while not self._is_over():
            self._run_epoch()
        self._say(f"stopped after {self.progress.update:,} updates: {self._is_over()}")

    def finish(self) -> None:
        """Averages checkpoints if the recipe says so, measures the task's metric and records it."""
        averaged = self._write_average()
        run = load_run(self.out)
        if not self.world.sharded:  # who shares a model out has no device for all of it
            run.model.to(self.device)
        if averaged:
            loss, best = validate(run.model, self.validation).loss, self.progress.best[-1]
            self._say(f"average of {averaged} checkpoints: validation loss {loss:.4f}; best single one {best:.4f}")
        metrics = evaluate_run(run)
        for name, value in metrics.items():
            self._say(f"{name}: {value:.4f}")
        self._write_record(metrics)

    def _run_epoch(self) -> None:
        progress, settings = self.progress, self.recipe.training
        epoch, every = self.prepared.train.epoch(progress.epoch), settings.evaluate_every
        for start in range(progress.batch, len(epoch), settings.accumulate):
            batches = range(start, min(start + settings.accumulate, len(epoch)))
            self._update(epoch, batches)
            progress.batch += len(batches)
            if progress.batch == len(epoch):
                progress.epoch, progress.batch = progress.epoch + 1, 0
            over = self._is_over()
            if over or (progress.update % every == 0 if every else progress.batch == 0):
                self._evaluate()
            if over or self._is_over():
                return

    def _update(self, epoch: Epoch, batches: range) -> None:
        """One step of the optimiser on the mean loss over all labels of these batches."""
        progress, settings = self.progress, self.recipe.training
        rate = learning_rate(settings, progress.update + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels = sum(epoch.label_count(i) for i in batches)
        mean_loss = self._backward(epoch, batches, labels)
        norm = self._clip(settings.clip_norm or math.inf)
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
        if self.log:
            entry = {
                "update": progress.update,
                "epoch": progress.epoch,
                "loss": mean_loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 3),
            }
            self.log.update(entry, progress.tokens / progress.seconds, self._seconds_left())

    def _backward(self, epoch: Epoch, batches: range, labels: int) -> float:
        """Gradients of the mean loss over ``labels``, and that loss: this process's share of the batches, then all together.

        Dropout is seeded by the batch's place: the same masks whichever process computes it, and after any interruption.
        """
        world, total = self.world, 0.0
        mine = batches[world.rank :: world.size]
        rounds = -(-len(batches) // world.size)
        for turn in range(rounds):  # as many in every process: who has fewer batches repeats one, and adds nothing
            i = mine[turn] if turn < len(mine) else batches[0]
            weight = world.size / labels if turn < len(mine) else 0.0  # gradients are averaged over processes
            torch.manual_seed(Random(f"dropout, {self.recipe.training.seed}, {self.progress.epoch}, {i}").getrandbits(63))
            with nullcontext() if turn == rounds - 1 else keep_gradients_here(self.loss):
                loss = self.loss(epoch[i].to(self.device)) * weight
                loss.backward()
            total += loss.item()
        clock = self.seconds_before + time.monotonic() - self.session_begin
        mean_loss, self.progress.seconds = world.sum(total / world.size, clock if world.is_first else 0.0)
        return mean_loss

    def _clip(self, longest: float) -> float:
        """Shortens the gradient to ``longest``; returns how long it was."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), longest)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _evaluate(self) -> None:
        """Validation; best.safetensors if it is the best so far; a checkpoint and run.json in any case."""
        progress = self.progress
        validation = validate(self.model, self.validation, self.world)
        better = not progress.best or validation.rank() < progress.best
        if better:
            progress.best, progress.evaluations_since_best = validation.rank(), 0
        else:
            progress.evaluations_since_best += 1
        weights, optimizer = (self.world.gather(x) for x in (self.model.state_dict(), optimizer_tensors(self.optimizer)))
        if self.log:
            self._save(validation, better, weights, optimizer)

    def _save(self, validation: Validation, better: bool, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """The checkpoint comes last: whatever is cut off before it is done again after a resume."""
        progress = self.progress
        if better:
            save_weights(weights, self.out / "best.safetensors")
        if self.recipe.training.average_last:
            self._keep_for_average(weights)
        entry = {"update": progress.update, "epoch": progress.epoch, "validation_loss": validation.loss}
        entry |= {} if validation.error is None else {"validation_error": validation.error}
        entry |= self._task_metric(validation)
        progress.seconds = self.seconds_before + time.monotonic() - self.session_begin
        assert self.log
        self.log.evaluation(entry | {"seconds": round(progress.seconds, 3)}, better)
        self._write_record({})
        save_progress(weights, optimizer, progress, self.out)
        self.saved = progress.update

    def _task_metric(self, validation: Validation) -> dict[str, float]:
        """The task's own metric on validation data, by its name."""
        task, count = self.recipe.task, self.recipe.training.metric_examples
        if task.kind == "language_model":
            return {task.metric: math.exp(min(validation.loss, 700.0))}
        if validation.error is not None:
            return {task.metric: 100.0 * (1.0 - validation.error)}
        if not count or self.world.sharded:
            return {}
        self.model.eval()
        limit = min(self.recipe.generation.max_tokens, self.model.config.max_target_length)
        examples = self.validation.examples[:count]
        value = greedy_metric(self.model, self.prepared.tokenizer, task.metric, examples, limit)
        self.model.train()
        return {task.metric: value}

    def _keep_for_average(self, weights: dict[str, Tensor]) -> None:
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        save_weights(weights, folder / f"{self.progress.update:08}.safetensors")
        for old in sorted(folder.glob("*.safetensors"))[: -self.recipe.training.average_last]:
            old.unlink()

    def _write_average(self) -> int:
        """average.safetensors, of as many checkpoints as are returned; 0: none.

        Its output is better than its validation loss: that may be no lower than the best single one.
        """
        paths = sorted((self.out / "checkpoints").glob("*.safetensors"))
        if len(paths) < 2:
            return 0
        save_weights(average_weights(paths), self.out / "average.safetensors")
        return len(paths)

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
        self._say(
            f"{self.recipe.task.name}: {parameters:,} parameters, vocabulary {self.model.config.vocab_size:,}; "
            f"{len(epoch.examples):,} examples{left_out} in {len(epoch):,} batches an epoch, {epoch.padding():.1%} padding; "
            f"{self.progress.precision} on {describe_machine(self.device)}"
        )

    def _say(self, text: str) -> None:
        if self.log:
            self.log.say(text)

    def _write_record(self, metrics: dict[str, float]) -> None:
        recipe, progress = self.recipe, self.progress
        provenance = {
            "seed": recipe.training.seed,
            "started": progress.started,
            "started_from": progress.started_from,
            "updates": progress.update,
            "epochs": progress.epoch,
            "seconds": round(progress.seconds, 1),
            "tokens": progress.tokens,
            "tokens_per_second": round(progress.tokens / progress.seconds, 1),
            "machine": describe_machine(self.device),
            "precision": progress.precision,
            "torch": torch.__version__,
            "data": self.prepared.digests,
            "processes": self.world.size,
            "validation_loss": progress.best[-1],
            "stopped": self._is_over(),
            "metrics": metrics,
        }
        write_record(self.out, self.model.config, asdict(recipe.task), asdict(recipe.generation), provenance)
