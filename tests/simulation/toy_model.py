"""A sequence model that is all bookkeeping: what comes next depends on all that a row's caches hold, and nothing else.

A row that was moved, branched or shared wrongly therefore says something else, or is found to hold what it must not.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.batch.kv_cache import Rows
from server.batch.sequence_model import Candidates, SequenceShape

VOCABULARY = 12
EOS = 2
_SCORES = np.log(np.random.default_rng(7).dirichlet(np.full(VOCABULARY, 0.6), 997)).astype(np.float32)


class ToyModel:
    """A ``SequenceModel`` with an encoder."""

    shape = SequenceShape(layers=1, kv_heads=1, head_width=1, vocab_size=VOCABULARY, longest_target=16, longest_source=16)
    top_k_choices = [4, 8, VOCABULARY]  # noqa: RUF012

    def __init__(self, rows: int, encoding_overhead: float = 0.0) -> None:
        self.rows, self.encoding_overhead = rows, encoding_overhead
        self.sources: list[tuple[int, ...]] = [()] * rows
        self.targets: list[tuple[int, ...]] = [()] * rows
        self._last = np.zeros((0, VOCABULARY), np.float32)

    def encode(self, sources: Sequence[Sequence[int]], rows: Sequence[Rows]) -> None:
        taken = [int(row) for own in rows for row in own]
        assert len(set(taken)) == len(taken), "a row has two owners"
        for source, own in zip(sources, rows, strict=True):
            for row in own.tolist():
                self.sources[row], self.targets[row] = tuple(source), ()

    def decode(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], top_k: int, *, keep_logits: bool) -> Candidates:
        self._last = np.empty((len(tokens), VOCABULARY), np.float32)
        for row, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            target = self.targets[row]
            assert len(target) >= position, "a position was never written"
            self.targets[row] = (*target[:position], token)
            key = repr((self.sources[row], self.targets[row])).encode()
            self._last[row] = _SCORES[zlib.crc32(key) % len(_SCORES)]
        order = np.argsort(-self._last, axis=1, kind="stable")[:, :top_k]
        return Candidates(order.astype(np.int64), np.take_along_axis(self._last, order, axis=1))

    def logits(self, rows: Rows) -> NDArray[np.float32]:
        return self._last[rows]

    def branch(self, source: Rows, target: Rows, start: NDArray[np.intp], stop: NDArray[np.intp]) -> None:
        old = [self.targets[row] for row in source.tolist()]
        for tokens, row, first, last in zip(old, target.tolist(), start.tolist(), stop.tolist(), strict=True):
            self.targets[row] = (*self.targets[row][:first], *tokens[first:last])

    def move(self, source: Rows, target: Rows, length: int) -> None:
        for one, other in zip(source.tolist(), target.tolist(), strict=True):
            self.sources[other], self.targets[other] = self.sources[one], self.targets[one][:length]

    def prefill(self, tokens: Sequence[int], start: int) -> None:
        raise AssertionError("a model with an encoder has no prompt to prefill")

    def adopt(self, rows: Rows, length: int) -> None:
        raise AssertionError("a model with an encoder has no prompt to prefill")
