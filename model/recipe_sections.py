"""The sections of a recipe. Each knows what is impossible in it, and says so by the name of the key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from model.batches import Kind
from model.tasks import TRAINING_PAIRS
from model.tokenizer import Normalization

Metric = Literal["exact_match", "bleu", "tokenized_bleu", "perplexity", "accuracy"]

_METRICS: dict[Kind, tuple[Metric, ...]] = {
    "sequence_to_sequence": ("exact_match", "bleu", "tokenized_bleu"),
    "language_model": ("perplexity",),
    "classification": ("accuracy",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecipe:
    name: str
    kind: Kind
    metric: Metric
    labels: tuple[str, ...] = ()
    """Classification: the name of each class, in order."""

    def problems(self) -> list[str]:
        problems = []
        if self.metric not in _METRICS[self.kind]:
            problems.append(f"task.metric of {self.kind} must be one of {', '.join(_METRICS[self.kind])}, not {self.metric}")
        if self.kind == "classification" and len(self.labels) < 2:
            problems.append("task.labels must name at least 2 classes")
        if self.kind != "classification" and self.labels:
            problems.append(f"task.labels must be empty for {self.kind}")
        if len(set(self.labels)) != len(self.labels):
            problems.append("task.labels must be different from each other")
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """Where examples come from: files below ``root``, or a task that makes its own."""

    root: str = ""
    train: tuple[str, ...] = ()
    """sequence_to_sequence: the source's file and the target's. Otherwise one or more files, read one after another."""
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.0
    """language_model without validation files: this share of the text, from its end."""
    test: tuple[str, ...] = ()
    """What held_out.jsonl is taken from; without it, the validation data."""
    generator: str = ""
    """A task of model/tasks instead of files."""
    epoch_pairs: int = 0
    """Pairs that the generator makes for each epoch, new ones every time."""
    bpe_dropout: float = 0.0
    """Segment the training texts anew for every epoch, each merge left out with this probability (Provilkov et al. 2020)."""
    cache: str = ""
    """The folder of the corpus in ids, which runs may share; empty: prepared/ beside the run."""
    held_out: int = 1000
    """Examples kept beside the model for checking whatever is made of it later."""

    def problems(self, kind: Kind) -> list[str]:
        if self.generator:
            problems = [
                f"data.{name} must be empty beside data.generator"
                for name in ("train", "validation", "test")
                if getattr(self, name)
            ]
            if self.generator not in TRAINING_PAIRS:
                problems.append(f"data.generator must be one of {', '.join(TRAINING_PAIRS)}, not {self.generator!r}")
            if self.epoch_pairs < 1:
                problems.append(f"data.epoch_pairs must be at least 1, not {self.epoch_pairs}")
            if self.bpe_dropout:
                problems.append("data.bpe_dropout must be 0 beside data.generator, whose every epoch is new")
            return problems
        problems = [] if self.train else ["data.train must name files (or data.generator a task)"]
        if kind == "language_model":
            if not self.validation and not 0.0 < self.validation_fraction < 1.0:
                problems.append(f"data.validation_fraction must be in (0, 1), not {self.validation_fraction}")
        elif not self.validation:
            problems.append("data.validation must name files")
        if kind == "sequence_to_sequence":
            problems += [
                f"data.{name} must be two files, source and target, not {len(getattr(self, name))}"
                for name in ("train", "validation", "test")
                if len(getattr(self, name)) not in (0, 2)
            ]
        if self.held_out < 1:
            problems.append(f"data.held_out must be at least 1, not {self.held_out}")
        if not 0.0 <= self.bpe_dropout < 1.0:
            problems.append(f"data.bpe_dropout must be in [0, 1), not {self.bpe_dropout}")
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerRecipe:
    kind: Literal["bpe", "characters", "subword_nmt"]
    vocab_size: int = 0
    """bpe: number of ids."""
    codes: str = ""
    """subword_nmt: the file of merges, below data.root."""
    normalization: Normalization = "none"
    prefix_space: bool = False
    """bpe: spell the first word of a text as any other. For classifiers: a text that begins with a space loses it."""

    def problems(self) -> list[str]:
        problems = []
        if (self.kind == "bpe") != (self.vocab_size > 0):
            problems.append(f"tokenizer.vocab_size must be {'set' if self.kind == 'bpe' else '0'} for {self.kind}")
        if (self.kind == "subword_nmt") != bool(self.codes):
            problems.append(f"tokenizer.codes must be {'set' if self.kind == 'subword_nmt' else 'empty'} for {self.kind}")
        if self.prefix_space and self.kind != "bpe":
            problems.append(f"tokenizer.prefix_space must be false for {self.kind}")
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    start_from: str = ""
    """A run of the same model: training begins with its weights and tokenizer instead of random weights."""
    max_updates: int
    max_epochs: int = 0
    """0: no limit, as for the next two."""
    max_minutes: float = 0.0
    patience: int = 0
    """Stop after this many evaluations that are no better than the best: by loss, of classes by errors."""
    evaluate_every: int = 0
    """Updates between evaluations; 0: at the end of each epoch."""
    metric_examples: int = 100
    """Validation examples decoded greedily at every evaluation, for the curve of the task's metric; 0: no such curve."""
    batch_tokens: int
    """Positions in a batch, padding included, on the wider side of source and target."""
    accumulate: int = 1
    """Batches whose gradients make one update."""
    optimizer: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    """muon: for the matrices inside the layers, with AdamW for all else."""
    learning_rate: float
    """The highest one."""
    schedule: Literal["inverse_sqrt", "cosine", "constant"] = "inverse_sqrt"
    warmup_updates: int = 0
    final_learning_rate: float = 0.0
    """Where the cosine ends."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    momentum: float = 0.0
    """sgd only."""
    weight_decay: float = 0.0
    """On matrices; never on biases, norms, embeddings and positions."""
    label_smoothing: float = 0.0
    consistency: float = 0.0
    """Strength of R-Drop (Liang et al. 2021; they use 5 for translation): two readings of each batch must agree; 0: one."""
    clip_norm: float = 0.0
    """Gradients longer than this are shortened to it; 0: never."""
    average_last: int = 0
    """Average the weights of this many last evaluations (Vaswani et al. 2017, section 6.1); 0: no average."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the processor multiplies bf16 faster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["replicated", "sharded"] = "replicated"
    """With several processes: each holds the whole model, or a share of it (FSDP2), for models that no device holds alone."""
    seed: int = 1

    def problems(self) -> list[str]:
        at_least = {"max_updates": 1, "batch_tokens": 1, "accumulate": 1, "learning_rate": 0, "final_learning_rate": 0,
                    "max_epochs": 0, "max_minutes": 0, "patience": 0, "evaluate_every": 0, "warmup_updates": 0, "eps": 0,
                    "momentum": 0, "weight_decay": 0, "clip_norm": 0, "average_last": 0, "metric_examples": 0, "consistency": 0,
                    "seed": 0}  # fmt: skip
        problems = [
            f"training.{name} must be at least {low}, not {getattr(self, name)}"
            for name, low in at_least.items()
            if not low <= getattr(self, name) < math.inf
        ]
        if not 0.0 <= self.label_smoothing < 1.0:
            problems.append(f"training.label_smoothing must be in [0, 1), not {self.label_smoothing}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            problems.append(f"training.betas must be in [0, 1), not {list(self.betas)}")
        if self.warmup_updates > self.max_updates:
            problems.append(f"training.warmup_updates ({self.warmup_updates}) must not exceed max_updates ({self.max_updates})")
        if self.momentum and self.optimizer != "sgd":
            problems.append(f"training.momentum must be 0 for {self.optimizer}")
        if self.optimizer == "muon" and self.parallel == "sharded":
            problems.append("training.optimizer=muon needs whole matrices: not with training.parallel=sharded")
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRecipe:
    """What the served model does when a caller leaves an option out."""

    beams: int = 1
    length_penalty: float = 1.0
    max_tokens: int = 256

    def problems(self) -> list[str]:
        problems = [
            f"generation.{name} must be at least 1, not {getattr(self, name)}"
            for name in ("beams", "max_tokens")
            if getattr(self, name) < 1
        ]
        if not 0.0 <= self.length_penalty <= 10.0:
            problems.append(f"generation.length_penalty must be in [0, 10], not {self.length_penalty}")
        return problems
