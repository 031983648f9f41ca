"""What callers write and get: plain frozen dataclasses, no protobuf."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Input = str | Sequence[int]
"""A text, or token ids of the model's vocabulary."""
Attention = Literal["", "alignment", "weights"]
"""What is returned of where the decoder looked: nothing; for each output token the source token that it looked at most; that,
and the weights of all source tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Draw tokens at random; None takes the default. Without a seed one is drawn, and returned in the result."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How tokens are chosen; None takes the model's default. ``protos/transformer.proto`` says in which order they apply."""

    beams: int | None = None
    hypotheses: int | None = None
    length_penalty: float | None = None
    coverage_penalty: float | None = None
    """Prefers hypotheses that leave nothing of the source out; needs a beam search."""
    max_tokens: int | None = None
    min_tokens: int | None = None
    patience: float | None = None
    sampling: Sampling | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    token_bias: Mapping[int, float] | None = None
    """What is added to the logits of single tokens."""
    no_repeat_ngram: int | None = None
    suppressed_tokens: Sequence[int] = ()
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    """The text ends before the first of them."""
    ignore_end_of_text: bool | None = None
    alternatives: int | None = None
    """One hypothesis for each of so many next tokens after the target prefix, most probable first."""
    required_phrases: Sequence[Input] = ()
    """Every output contains each of them; needs a beam search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    id: int
    log_probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    text: str
    log_probability: float
    """Of the whole output, its end included, in the model's own distribution."""
    score: float
    """What hypotheses are ranked by."""
    finish_reason: str
    """"end_of_text", "stop" or "length"."""
    token_count: int
    tokens: tuple[Token, ...]
    """Empty unless asked for."""
    alignment: tuple[int, ...] = ()
    """For each output token a position in the source; empty unless asked for."""
    attention: tuple[tuple[float, ...], ...] = ()
    """For each output token the weights of all source tokens; empty unless asked for."""

    @property
    def probability(self) -> float:
        return math.exp(self.log_probability)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What became of one input."""

    hypotheses: tuple[Hypothesis, ...]
    """Best first; samples and alternatives in their order."""
    input_token_count: int
    seed: int | None
    """None when not sampling."""

    @property
    def text(self) -> str:
        """Of the first hypothesis."""
        return self.hypotheses[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedText:
    """New text of one hypothesis of one input; never taken back."""

    input: int
    hypothesis: int
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedGeneration:
    """The whole result of one input, after its last text."""

    input: int
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassProbability:
    label: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    classes: tuple[ClassProbability, ...]
    """All of them, most probable first."""
    input_token_count: int

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[0].label


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    vector: tuple[float, ...]
    input_token_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    log_probability: float
    token_count: int
    tokens: tuple[Token, ...]
    """Empty unless asked for."""
    alignment: tuple[int, ...] = ()
    """For each output token a position in the source; empty unless asked for."""
    attention: tuple[tuple[float, ...], ...] = ()
    """For each output token the weights of all source tokens; empty unless asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    max_inputs: int
    max_text_bytes: int
    max_input_tokens: int
    max_output_tokens: int
    max_beams: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    name: str
    family: str
    task: str
    precision: str
    device: str
    fingerprint: str
    parameters: int
    limits: ModelLimits
    default_options: Options
    labels: tuple[str, ...]
    parity_certificate: str
    """JSON."""
    can_align: bool
    """Whether attention and a coverage penalty may be asked for."""
    shortlist_size: int
    """Above 0: outputs contain only so many of the vocabulary's tokens."""
