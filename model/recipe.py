"""Recipes: one TOML file says everything about a training run, read into frozen dataclasses that check themselves.

A typing error is never silently ignored: unknown keys, wrong types and impossible values are refused by name, all at once.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from model.batches import Kind
from model.config import ConfigError, ModelConfig
from model.recipe_sections import DataRecipe, GenerationRecipe, TaskRecipe, TokenizerRecipe, TrainingRecipe
from model.typed_table import read_table

_FAMILIES: dict[Kind, str] = {
    "sequence_to_sequence": "encoder_decoder",
    "language_model": "decoder_only",
    "classification": "encoder_only",
}


class RecipeError(ValueError):
    """A recipe that cannot be run. ``problems`` names every offending key."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    task: TaskRecipe
    data: DataRecipe
    tokenizer: TokenizerRecipe
    model: ModelConfig
    """Its vocabulary is only known once the tokenizer is made: use ``model_config``."""
    training: TrainingRecipe
    generation: GenerationRecipe = field(default_factory=GenerationRecipe)

    def model_config(self, vocab_size: int) -> ModelConfig:
        return ModelConfig.from_dict(self.model.to_dict() | {"vocab_size": vocab_size})

    def path(self, name: str) -> Path:
        """A file of the corpus."""
        return Path(self.data.root).expanduser() / name

    def to_toml(self) -> str:
        """The recipe with every default and override written out; ``read_recipe`` gives it back."""
        sections = asdict(self)
        for key in _DERIVED:
            del sections["model"][key]
        return "\n".join(
            f"[{name}]\n"
            + "".join(
                f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in section.items() if value is not None
            )
            for name, section in sections.items()
        )


_SECTIONS = {
    "task": TaskRecipe,
    "data": DataRecipe,
    "tokenizer": TokenizerRecipe,
    "model": ModelConfig,
    "training": TrainingRecipe,
    "generation": GenerationRecipe,
}
_DERIVED = ("vocab_size", "classes")
"""Keys of the model that follow from the tokenizer and the labels."""


def shipped_recipes() -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name, or a file; ``overrides`` are ``section.key=value`` with a TOML value."""
    file = _folder() / f"{name_or_path}.toml" if name_or_path in shipped_recipes() else Path(name_or_path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(shipped_recipes())
        raise RecipeError([f"{name_or_path}: {error.strerror} (shipped recipes: {known})"]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([f"{name_or_path}: not UTF-8"]) from error
    return read_recipe(text, overrides)


def read_recipe(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """Raises RecipeError with everything that is wrong."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([f"not TOML: {error}"]) from error
    problems = _apply(overrides, tables)
    problems += [f"unknown section [{name}]" for name in tables if name not in _SECTIONS]
    sections: dict[str, Any] = {}
    for name, kind in _SECTIONS.items():
        table = tables.get(name, {})
        if not isinstance(table, dict):
            problems.append(f"{name} must be a section, not {table!r}")
        elif name == "model":
            sections[name] = _read_model(table, sections.get("task"), problems)
        else:
            sections[name] = read_table(kind, table, name, problems)
    task = sections.get("task")
    for section in sections.values():
        if isinstance(section, DataRecipe):
            problems += section.problems(task.kind) if task else []
        elif section is not None and not isinstance(section, ModelConfig):
            problems += section.problems()
    data, tokenizer = sections.get("data"), sections.get("tokenizer")
    if data and tokenizer and data.bpe_dropout and tokenizer.kind == "characters":
        problems.append("data.bpe_dropout must be 0 for characters, which are never merged")
    if problems:
        raise RecipeError(problems)
    return Recipe(**sections)


def _read_model(table: dict[str, Any], task: TaskRecipe | None, problems: list[str]) -> ModelConfig | None:
    problems += [f"model.{key} follows from the tokenizer and task.labels: leave it out" for key in _DERIVED if key in table]
    derived = {"vocab_size": 1, "classes": len(task.labels) if task else 0}
    try:
        config = read_table(ModelConfig, table | derived, "model", problems)
    except ConfigError as error:
        problems += [f"model.{problem}" for problem in error.problems]
        return None
    if config and task and config.family != _FAMILIES[task.kind]:
        problems.append(f"model.family must be {_FAMILIES[task.kind]} for {task.kind}, not {config.family}")
    return config


def _apply(overrides: Sequence[str], tables: dict[str, Any]) -> list[str]:
    problems = []
    for override in overrides:
        name, equals, written = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            problems.append(f"--set must be section.key=value, not {override!r}")
            continue
        try:
            value = tomllib.loads(f"value = {written}")["value"]
        except tomllib.TOMLDecodeError:
            value = written.strip()  # a path or a name without quotes
        table = tables.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    return problems


def _folder() -> Any:
    return resources.files("model") / "recipes"
