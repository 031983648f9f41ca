"""A training that begins with another run's weights and tokenizer (fine-tuning) instead of random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.checkpoint import Run, RunError, load_run, weights_file
from model.data import digest
from model.recipe import Recipe

MAY_DIFFER = ("dropout", "attention_dropout", "activation_dropout")
"""Settings of [model] that mean the same network."""


@dataclass(frozen=True, slots=True)
class Start:
    run: Run
    sha256: str
    """Of the file of weights."""


def read_start(recipe: Recipe) -> Start | None:
    """The run that ``training.start_from`` names; None if it names none.

    Raises:
        RunError: the run cannot be read, or its model is another network than the recipe's.
    """
    if not recipe.training.start_from:
        return None
    path = Path(recipe.training.start_from).expanduser()
    run = load_run(path)
    ours, theirs = recipe.model_config(run.tokenizer.vocab_size).to_dict(), run.config.to_dict()
    differ = [name for name in ours if ours[name] != theirs[name] and name not in MAY_DIFFER]
    if differ:
        problems = "; ".join(f"model.{name} is {ours[name]!r} here and {theirs[name]!r} there" for name in differ)
        raise RunError(f"{path}: cannot start from another model: {problems}")
    return Start(run, digest(weights_file(path)))
