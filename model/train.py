"""From a recipe to a trained run: checks, data, the loop of ``model.trainer``, and the report.

Started by ``torchrun``, every process comes through here; the first one writes.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from model.checkpoint import Run, load_run
from model.claim import check_same_inputs, claim_directory
from model.data import DataError, digest
from model.device import keep_freed_memory, pick_device, pick_precision
from model.distributed import World, join
from model.files import write_json_lines, write_text
from model.optim import make_optimizer
from model.prepare import Prepared, prepare
from model.progress import Progress, read_progress, restore_optimizer, restore_weights
from model.recipe import Recipe
from model.start import read_start
from model.tokenizer import Tokenizer, TokenizerError
from model.trainer import Trainer, TrainingError
from model.transformer import Transformer

__all__ = ["TrainingError", "train"]

CALIBRATION_EXAMPLES = 256
"""Training examples kept beside the model, from which eight-bit graphs take their scales."""


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    tensorboard: bool = False,
    console: Console | None = None,
) -> Run:
    """Trains ``recipe`` into the directory ``out`` and returns the finished run.

    Args:
        tensorboard: write scalars for TensorBoard into ``out``/tensorboard as well.

    Raises:
        RunError: ``out`` exists (without ``resume`` or ``force``), or does not fit the recipe (with ``resume``).
        DataError, TokenizerError: for a corpus that cannot be used.
        TrainingError: the device is not there, the disk is full, or the loss is no number any more.
    """
    with join(sharded=recipe.training.parallel == "sharded") as world:
        console = (console or Console(stderr=True)) if world.is_first else Console(quiet=True)
        trainer = None
        try:
            if world.is_first:
                claim_directory(out, recipe, resume=resume, force=force)
            trainer = _make_trainer(recipe, out, resume, console, world)
            if world.is_first:
                trainer.open_log(console, resume, tensorboard)
            trainer.run()
            if world.is_first:
                trainer.finish()
        except OSError as error:
            saved = trainer.saved if trainer else 0
            rest = f"the checkpoint of update {saved:,} is whole: go on with --resume" if saved else "nothing was saved yet"
            raise TrainingError(f"{error.filename or out}: {error.strerror or error}; {rest}") from error
        finally:
            if trainer:
                trainer.close_log()
        world.wait()
    return load_run(out)


def _make_trainer(recipe: Recipe, out: Path, resume: bool, console: Console, world: World) -> Trainer:
    """Everything up to the first update. Process 0 makes the tokenizer, the others read it."""
    try:
        device = pick_device(recipe.training.device)
    except RuntimeError as error:
        raise TrainingError(str(error)) from error
    if device.type == "cpu":
        keep_freed_memory()
    start = None if resume else read_start(recipe)
    folder = Path(recipe.data.cache).expanduser() if recipe.data.cache else out / "prepared"
    if world.is_first:
        known = Tokenizer.load(out / "tokenizer.json") if resume else start.run.tokenizer if start else None
        try:
            prepared = prepare(recipe, known, folder)
        except (DataError, TokenizerError):
            if not resume and out.exists():  # what was prepared before; the directory was claimed, and is not a run yet
                shutil.rmtree(out)
            raise
        if not resume:
            _write_inputs(recipe, prepared, out)
    world.wait()
    if not world.is_first:
        prepared = prepare(recipe, Tokenizer.load(out / "tokenizer.json"), folder)
    inputs = {"tokenizer.json": digest(out / "tokenizer.json")} | prepared.digests
    torch.manual_seed(recipe.training.seed)
    model = Transformer(recipe.model_config(prepared.tokenizer.vocab_size)).train()
    if start:
        model.load_state_dict(start.run.model.state_dict())
    if resume:
        progress, tensors = read_progress(out, console.print)
        check_same_inputs(out, progress.inputs, inputs)
        restore_weights(model, tensors, out)
    else:
        progress = Progress(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            started_from=start.sha256 if start else "",
            precision=pick_precision(recipe.training.precision, device),
            inputs=inputs,
        )
    model = world.place(model, device)
    optimizer = make_optimizer(model, recipe.training)
    if resume:
        restore_optimizer(optimizer, tensors)
    if world.is_first:
        write_text(out / "recipe.toml", recipe.to_toml())
    return Trainer(
        recipe=recipe,
        prepared=prepared,
        out=out,
        device=device,
        world=world,
        model=model,
        optimizer=optimizer,
        progress=progress,
    )


def _write_inputs(recipe: Recipe, prepared: Prepared, out: Path) -> None:
    """What a run keeps of its data."""
    out.mkdir(parents=True, exist_ok=True)
    prepared.tokenizer.save(out / "tokenizer.json")
    write_json_lines(out / "held_out.jsonl", prepared.held_out)
    some = prepared.plain()[:CALIBRATION_EXAMPLES]
    write_json_lines(out / "calibration.jsonl", [{"input": list(e.input), "output": list(e.output)} for e in some])
