"""What the engine asks of a model with a decoder. ``runtime`` answers with ONNX Runtime; a test may answer with anything.

Shapes: R row capacity, B rows of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from server.batch.kv_cache import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceShape:
    """The sizes of a model with a decoder, from its configuration."""

    layers: int
    kv_heads: int
    head_width: int
    vocab_size: int
    longest_target: int
    longest_source: int
    """0 without an encoder."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SequenceShape:
        return cls(
            layers=config["decoder_layers"],
            kv_heads=config["kv_heads"] or config["heads"],
            head_width=config["d_model"] // config["heads"],
            vocab_size=config["vocab_size"],
            longest_target=config["max_target_length"],
            longest_source=config["max_source_length"],
        )

    @property
    def has_encoder(self) -> bool:
        return self.longest_source > 0


class Candidates(NamedTuple):
    """The best next tokens of each row, best first; valid until the next step."""

    ids: NDArray[np.int64]
    """[B, top_k]."""
    log_probabilities: NDArray[np.float32]
    """[B, top_k]."""


class SequenceModel(Protocol):
    """A decoder over R cache rows, with an encoder in front of it or a staging row where prompts are prefilled."""

    shape: SequenceShape
    rows: int
    encoding_overhead: float
    """Seconds that a call of ``encode`` takes however little it encodes; 0 where nobody knows."""

    @property
    def top_k_choices(self) -> Sequence[int]:
        """The numbers of candidates a step can be asked for, rising; few, because each may have bindings of its own."""

    def encode(self, sources: Sequence[Sequence[int]], rows: Sequence[Rows]) -> None:
        """Encodes sources and puts what the decoder needs of source i into every row of rows[i]."""

    def prefill(self, tokens: Sequence[int], start: int) -> None:
        """Feeds the tokens at positions start, start + 1, ... to the staging row."""

    def adopt(self, rows: Rows, length: int) -> None:
        """Copies the first ``length`` positions of the staging row into ``rows``."""

    def decode(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], top_k: int, *, keep_logits: bool = True
    ) -> Candidates:
        """One step of rows [0, B): tokens[i] stands at positions[i] of row i; what comes next?

        Args:
            keep_logits: whether ``logits`` may be asked for afterwards.
        """

    def logits(self, rows: Rows) -> NDArray[np.float32]:
        """[len(rows), V] of the last step; -inf for tokens that the model does not write."""

    def branch(self, source: Rows, target: Rows, start: NDArray[np.intp], stop: NDArray[np.intp]) -> None:
        """Copies target positions start[i] to stop[i] of row source[i] to row target[i], which agrees on those before.

        Both have the same source text.
        """

    def move(self, source: Rows, target: Rows, length: int) -> None:
        """Row source[i], of at most ``length`` target positions, becomes row target[i]."""
