"""What training leaves on the disk, and how it is read again.

A run is a directory:

    recipe.toml            the recipe with every default and override
    run.json               the model's configuration, the task, generation defaults, where everything came from
    tokenizer.json
    best.safetensors       the weights with the best validation loss
    average.safetensors    the mean of the last few evaluations' weights, if the recipe asks for it; preferred
    last.safetensors       the latest weights, and what it takes to go on exactly: optimiser, place in the data
    previous.safetensors   the same of one evaluation earlier, should the last one be damaged
    held_out.jsonl         examples that training never saw
    calibration.jsonl      a few training examples in ids
    prepared/              the corpus in ids, unless the recipe's data.cache keeps it elsewhere; may be deleted
    log.jsonl              every update and evaluation
    report.html, plots/    the run on one page, and its pictures
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from model.config import ConfigError, ModelConfig
from model.files import write_atomically, write_text
from model.recipe_sections import GenerationRecipe, TaskRecipe
from model.tokenizer import Tokenizer, TokenizerError
from model.transformer import Transformer
from model.typed_table import read_table

FORMAT_VERSION = 1
WEIGHTS = ("average.safetensors", "best.safetensors")
"""In order of preference."""
STATE = "training/"
"""Prefix of the tensors in last.safetensors that are not weights: see model.progress."""


class RunError(ValueError):
    """A run directory that cannot be used, in one line: where, and what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A trained model with everything around it."""

    model: Transformer
    """In evaluation mode, on the CPU."""
    config: ModelConfig
    tokenizer: Tokenizer
    task: dict[str, Any]
    """name, kind, metric, labels."""
    generation: dict[str, Any]
    """beams, length_penalty, max_tokens."""
    provenance: dict[str, Any]
    held_out: list[dict[str, Any]]
    calibration: list[dict[str, list[int]]]
    """input and output, as model.batches.Example."""


def load_run(path: str | Path) -> Run:
    """Raises RunError for anything missing or damaged."""
    directory = Path(path)
    record = read_record(directory)
    task, generation = _read_sections(record, directory / "run.json")
    try:
        config = ModelConfig.from_dict(record["model"])
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
    except ConfigError as error:
        raise RunError(f"{directory / 'run.json'}: model: {error}") from error
    except TokenizerError as error:
        raise RunError(str(error)) from error
    answer = "label" if task["kind"] == "classification" else "target"
    held_out = _read_lines(directory / "held_out.jsonl", {"source": str, answer: str})
    calibration = _read_lines(directory / "calibration.jsonl", {"input": list, "output": list})
    if tokenizer.vocab_size != config.vocab_size:
        raise RunError(f"{directory}: tokenizer of {tokenizer.vocab_size} ids beside a model of {config.vocab_size}")
    weights = weights_file(directory)
    model = Transformer(config)
    load_weights(model, weights)
    return Run(
        model=model.eval(),
        config=config,
        tokenizer=tokenizer,
        task=task,
        generation=generation,
        provenance=record["provenance"] | {"weights": weights.name},
        held_out=held_out,
        calibration=calibration,
    )


def weights_file(directory: Path) -> Path:
    """What ``load_run`` reads."""
    return next((directory / name for name in WEIGHTS if (directory / name).exists()), directory / WEIGHTS[-1])


def _read_sections(record: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Task and generation, checked and with every default."""
    task, generation = None, None
    problems = [
        f"{name} must be a section, not {record[name]!r:.40}" if name in record else f"{name} is missing"
        for name in ("model", "task", "generation", "provenance")
        if not isinstance(record.get(name), dict)
    ]
    if not problems:
        task = read_table(TaskRecipe, record["task"], "task", problems)
        generation = read_table(GenerationRecipe, record["generation"], "generation", problems)
    if task and generation:
        problems += task.problems() + generation.problems()
    if not task or not generation or problems:
        raise RunError(f"{path}: {'; '.join(problems)}")
    return asdict(task), asdict(generation)


def _read_lines(path: Path, keys: dict[str, type]) -> list[dict[str, Any]]:
    """Examples, each with these keys and their types."""
    try:
        examples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    for number, example in enumerate(examples, 1):
        if not isinstance(example, dict) or any(not isinstance(example.get(key), kind) for key, kind in keys.items()):
            raise RunError(f"{path}: example {number} must have {' and '.join(keys)}, not {example!r:.80}")
    return examples


def read_record(directory: Path) -> dict[str, Any]:
    """run.json."""
    path = directory / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise RunError(f"{path}: not a run of format version {FORMAT_VERSION}")
    return record


def write_record(
    directory: Path, config: ModelConfig, task: dict[str, Any], generation: dict[str, Any], provenance: dict[str, Any]
) -> None:
    record = {
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "task": task,
        "generation": generation,
        "provenance": provenance,
    }
    write_text(directory / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: temporary.write_bytes(save(on_cpu)))


def load_weights(model: Transformer, path: Path) -> None:
    """Raises RunError unless the file holds exactly this model's weights."""
    fill_model(model, {name: tensor for name, tensor in read_tensors(path).items() if not name.startswith(STATE)}, path)


def average_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_tensors(path).items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    return {name: (tensor / len(paths)).float() for name, tensor in total.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises RunError for a file that is missing or cannot be read."""
    try:
        return load_file(path)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise RunError(f"{path}: damaged: {error}") from error


def fill_model(model: Transformer, weights: dict[str, Tensor], path: Path) -> None:
    """Raises RunError, naming ``path``, unless these are exactly the model's tensors."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not part of the model" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {list(tensor.shape)}, not {list(expected[name].shape)}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise RunError(f"{path}: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(weights)
