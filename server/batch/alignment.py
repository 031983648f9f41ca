"""Where the decoder looked in the source, and how well an output covers it.

Found once an output is whole, by reading it again in one pass (``export.graphs.AlignGraph``): decode steps know nothing of it,
and what a request gets depends on its own source and outputs alone.

Shapes: T tokens of an output, S source positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from server.requests import Attention, GenerationRequest, Hypothesis

Weights = NDArray[np.float32]
Align = Callable[[Sequence[int], Sequence[Sequence[int]]], list[Weights]]
"""(source, tokens that the decoder read of each output) -> the weights [T, S] of each output."""

_WEIGHTS_TOGETHER = 2**20
"""Of each head, that are in memory at once: a long search may end with many long hypotheses."""
_LEAST_SEEN = 2.0**-126
"""The least attention that a source token is said to have had: its logarithm must be a number."""


class Aligner:
    """Completes hypotheses with what their request asks of their attention.

    Args:
        align: of the model.
        start_token: what the decoder reads first.
    """

    def __init__(self, align: Align, start_token: int) -> None:
        self._align, self._start_token = align, start_token

    def complete(self, hypotheses: Sequence[Hypothesis], request: GenerationRequest) -> list[Hypothesis]:
        """Adds the coverage penalty to scores, and alignments and weights, where they are asked for."""
        read = [(self._start_token, *hypothesis.tokens[:-1]) for hypothesis in hypotheses]
        size = max(1, _WEIGHTS_TOGETHER // (len(request.input_ids) * max(map(len, read))))
        weights = [own for i in range(0, len(read), size) for own in self._align(request.input_ids, read[i : i + size])]
        return [self._completed(one, own, request) for one, own in zip(hypotheses, weights, strict=True)]

    def _completed(self, hypothesis: Hypothesis, weights: Weights, request: GenerationRequest) -> Hypothesis:
        score, asked = hypothesis.score, request.attention
        if penalty := request.decoding.coverage_penalty:
            score += penalty * coverage(weights)
        alignment = () if asked is Attention.NONE else tuple(weights.argmax(axis=1).tolist())
        rows = tuple(map(tuple, weights.tolist())) if asked is Attention.WEIGHTS else ()
        return replace(hypothesis, score=score, alignment=alignment, attention=rows)


def coverage(weights: Weights) -> float:
    """The sum over source positions of log(min(attention, 1)), at most 0: see ``model.alignment.coverage``."""
    return float(np.log(weights.sum(axis=0).clip(_LEAST_SEEN, 1.0)).sum())
