"""What a request is, once it has passed the door, and what comes back from the engine.

Everything behind the door trusts these types: ``server.edge.door`` is the only way in, it collects every violation before
refusing, and nothing behind it checks again. Plain Python; no clock, no I/O, no gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

MAX_STOP_TOKENS = 16
"""Stop tokens that one request may have."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that a caller got wrong, in the words the caller will read."""

    field: str
    description: str


class InvalidRequest(ValueError):
    """A request that can never succeed as it is. ``violations`` names every offending field."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one call, all known before anything is allocated."""

    max_inputs: int = 256
    max_text_bytes: int = 16_384
    max_input_tokens: int
    """Special tokens included."""
    max_output_tokens: int
    """For a decoder-only model the prompt counts against it too."""
    max_beams: int = 16
    """Largest beam width and largest number of samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Seeded ancestral sampling (Holtzman et al. 2020 for top_p)."""

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less probable than this share of the most probable one are dropped (Nguyen et al. 2024)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustments:
    """What changes the model's distribution before a token is chosen, in the order of application.

    Penalties look at the output so far, a forced prefix included; the input counts for none of them. What is forbidden has
    probability 0, and the other tokens keep theirs.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens already written are divided by it when positive, else multiplied (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was written."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token already written."""
    token_bias: tuple[tuple[int, float], ...] = ()
    """(id, what its logit gains)."""
    no_repeat_ngram: int = 0
    """No sequence of this many tokens is written twice, unless nothing else is left; 0: no such rule."""
    suppressed_tokens: tuple[int, ...] = ()
    """Never written."""

    @property
    def reweighs(self) -> bool:
        """Tokens that are not forbidden may change their probability, too."""
        return self.repetition_penalty != 1 or bool(self.frequency_penalty or self.presence_penalty or self.token_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How the tokens of one request are chosen: greedy (beams = 1), beam search, or sampling."""

    max_tokens: int
    """The end-of-text token included."""
    min_tokens: int = 0
    beams: int = 1
    hypotheses: int = 1
    """Hypotheses returned; with sampling, the number of independent samples."""
    length_penalty: float = 1.0
    coverage_penalty: float = 0.0
    """Times the coverage of Wu et al. 2016, equation 14, is added to the score of a hypothesis; under beam search."""
    patience: float = 1.0
    sampling: Sampling | None = None
    adjustments: Adjustments = Adjustments()
    stop_tokens: tuple[int, ...] = ()
    """Each ends an output as the end-of-text token does."""
    stop_strings: tuple[str, ...] = ()
    """An output ends with the token that completes one of them; counted after min_tokens and after a forced prefix."""
    alternatives: int = 0
    """Above 0: so many outputs, one for each of the best tokens at the first position after the forced prefix; each is the best
    that a search of its own finds from there on, and ``hypotheses`` is 1."""
    required_phrases: tuple[tuple[int, ...], ...] = ()
    """Every output contains the tokens of each, next to each other; under beam search."""

    @property
    def rows(self) -> int:
        """Rows of the running batch that this needs: one for each live hypothesis."""
        return max(1, self.alternatives) * (self.hypotheses if self.sampling else self.beams)


class Attention(Enum):
    """What a caller is told of where the decoder looked in the source."""

    NONE = "none"
    ALIGNMENT = "alignment"
    WEIGHTS = "weights"
    """The alignment, and the weights that it comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One input, checked. A call with several inputs becomes several of these."""

    id: str
    input_ids: tuple[int, ...]
    """Source (encoder-decoder) or prompt (decoder-only), special tokens included."""
    decoding: Decoding
    forced: tuple[int, ...] = ()
    """Target tokens that every output begins with; their log-probabilities count (Score forces the whole target)."""
    forced_only: bool = False
    """End when the forced tokens are consumed: scoring rather than generating."""
    stream: bool = False
    """Report tokens as they become final, not only the result."""
    attention: Attention = Attention.NONE

    @property
    def quiet(self) -> int:
        """Tokens at the beginning of the output among which no stop counts."""
        return max(self.decoding.min_tokens, len(self.forced))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingRequest:
    """One input of an encoder-only model: class probabilities, a vector, or both, whatever the model's graph gives."""

    id: str
    input_ids: tuple[int, ...]


class FinishReason(Enum):
    END_OF_TEXT = "end_of_text"
    STOP = "stop"
    """A stop token or a stop string."""
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    tokens: tuple[int, ...]
    """What ended it included (end-of-text or stop token, tokens of a stop string), the prompt not; forced tokens included."""
    log_probabilities: tuple[float, ...]
    """One for each token, of the model's own distribution: before adjustments, temperature or anything else."""
    log_probability: float
    """Their sum."""
    score: float
    """What hypotheses are ranked by: the sum of their adjusted log-probabilities / len(tokens) ** length_penalty, and the
    coverage penalty."""
    finish_reason: FinishReason
    alignment: tuple[int, ...] = ()
    """For each token the position in the source that the decoder looked at most; empty unless asked for."""
    attention: tuple[tuple[float, ...], ...] = ()
    """For each token the weights of all source positions; empty unless asked for."""


@dataclass(frozen=True, slots=True)
class TokensReady:
    """Tokens of one hypothesis that have become final; never taken back."""

    hypothesis: int
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The result of a generation: its hypotheses, best first (samples, alternatives: in order). Always the last event."""

    hypotheses: tuple[Hypothesis, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The result of an encoding request. Always the last event."""

    probabilities: tuple[float, ...]
    """One for each class; empty when the model has no classification head."""
    vector: tuple[float, ...]


class Failure(Enum):
    """Why a checked request ended without a result. The service maps each to one status code."""

    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    OVERLOADED = "overloaded"
    SHUTTING_DOWN = "shutting_down"
    NUMERICS = "numerics"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a result. Always the last event."""

    failure: Failure
    message: str
    """Fit for the caller's eyes: no internals."""
    retry_after: float | None = None
    """Seconds after which the same request may succeed, where that is known."""


Event = TokensReady | Finished | Encoded | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """The bundle's own answer for every option a caller leaves out."""

    beams: int = 1
    length_penalty: float = 1.0
    max_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Sampling as a caller wrote it; None stands for an absent field."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingOptions:
    """Options as a caller wrote them; None stands for an absent field."""

    beams: int | None = None
    hypotheses: int | None = None
    length_penalty: float | None = None
    coverage_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    patience: float | None = None
    sampling: SamplingOptions | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    token_bias: tuple[tuple[int, float], ...] = ()
    no_repeat_ngram: int | None = None
    suppressed_tokens: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_end_of_text: bool = False
    alternatives: int | None = None
    required_phrases: tuple[str | tuple[int, ...] | None, ...] = ()
    """Texts or ids; None for a phrase that was neither."""
