"""Who may write into a run's directory: a new run, one that replaces it on purpose, or the same one going on."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from model.checkpoint import RunError
from model.files import remove_unfinished
from model.recipe import Recipe, RecipeError, read_recipe

MAY_CHANGE = (
    "data.cache",
    "training.max_updates",
    "training.max_epochs",
    "training.max_minutes",
    "training.patience",
    "training.metric_examples",
    "training.device",
    "training.parallel",
)
"""Settings that a resumed run may set anew: they say when to stop and where to run."""


def claim_directory(out: Path, recipe: Recipe, *, resume: bool, force: bool) -> None:
    """Raises RunError rather than touch anything that is not to be replaced."""
    if resume:
        _check_same_recipe(out, recipe)
        _check_files(out)
        remove_unfinished(out)
    elif out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file")
    elif out.is_dir() and any(out.iterdir()):
        if not force:
            raise RunError(f"{out} exists: go on with --resume, or replace it with --force")
        if not (out / "recipe.toml").exists():
            raise RunError(f"{out} is not a run (it has no recipe.toml): remove it by hand")
        shutil.rmtree(out)


def check_same_inputs(out: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Raises RunError if the tokenizer or a file of the corpus is no longer what training began with.

    Args: name to sha256, as ``model.progress.Progress.inputs``.
    """
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        raise RunError(f"{out}: cannot resume: {', '.join(changed)} changed since this run began")


def _check_files(out: Path) -> None:
    """What training would only miss at its end, or in an hour."""
    missing = [name for name in ("tokenizer.json", "held_out.jsonl", "calibration.jsonl") if not (out / name).exists()]
    if missing:
        raise RunError(f"{out}: cannot resume without {', '.join(missing)}")


def _check_same_recipe(out: Path, recipe: Recipe) -> None:
    path = out / "recipe.toml"
    try:
        before = asdict(read_recipe(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}: nothing to resume") from error
    except (RecipeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: damaged: {error}") from error
    changed = [
        f"{section}.{key}"
        for section, values in asdict(recipe).items()
        for key, value in values.items()
        if value != before[section][key] and f"{section}.{key}" not in MAY_CHANGE
    ]
    if changed:
        raise RunError(f"{out}: cannot resume with another {', '.join(changed)}")
