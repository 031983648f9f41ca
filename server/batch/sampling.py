"""Choosing one token per row: the most probable, or one drawn at random. Vectorised over rows.

Shapes: B rows, W candidates, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.requests import Sampling

Ids = NDArray[np.int64]
LogProbabilities = NDArray[np.float32]


def uniform_draws(sampling: Sampling, sample: int, count: int) -> NDArray[np.float64]:
    """The ``count`` numbers in [0, 1) that sample ``sample`` of a request will consume, one a step.

    Philox (Salmon et al. 2011) with key (seed, sample): counter-based, so they depend on nothing else in the batch.
    """
    key = np.array([sampling.seed, sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def forbid(ids: Ids, log_probabilities: LogProbabilities, token: int, rows: NDArray[np.bool_]) -> LogProbabilities:
    """[B, W] candidates with ``token`` made impossible on the rows where ``rows`` [B] is True."""
    return np.where((ids == token) & rows[:, None], np.float32(-np.inf), log_probabilities)


def most_probable(ids: Ids, log_probabilities: LogProbabilities) -> Ids:
    """Column [B] of the best candidate of each row; the first of equals, so the lowest id."""
    return log_probabilities.argmax(axis=1)


def nth_possible(log_probabilities: LogProbabilities, n: Ids) -> Ids:
    """Column [B] of candidate number n[i] of each row, counted from 0 and without the forbidden ones."""
    return (np.isfinite(log_probabilities).cumsum(axis=1) > n[:, None]).argmax(axis=1)


def draw(
    log_probabilities: LogProbabilities,
    uniform: NDArray[np.float64],
    temperature: NDArray[np.float64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    min_p: NDArray[np.float64],
) -> Ids:
    """Column [B] of a candidate drawn from each row.

    The candidates are laid out on [0, 1) in their order, each as wide as its probability, and ``uniform`` points at one.

    Args:
        log_probabilities: [B, W], falling along each row except for forbidden ones (-inf).
        uniform: [B] in [0, 1).
        temperature: [B]; divides the log-probabilities.
        top_k: [B]; only the first top_k possible candidates count; 0: all.
        top_p: [B]; only the first candidates that together reach it count.
        min_p: [B]; only candidates count that have at least this share of the first one's probability.
    """
    possible = np.isfinite(log_probabilities)
    rank = possible.cumsum(axis=1)
    possible &= (top_k[:, None] == 0) | (rank <= top_k[:, None])
    scaled = np.where(possible, log_probabilities.astype(np.float64) / temperature[:, None], -np.inf)
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    kept = np.full(len(p), p.shape[1] - 1)
    if min_p.any():
        probable = p >= min_p[:, None] * p.max(axis=1, keepdims=True)
        kept -= probable[:, ::-1].argmax(axis=1)
    p = p.cumsum(axis=1)
    # The candidate that reaches top_p is still in; what lies behind it is out.
    kept = np.minimum((p < top_p[:, None]).sum(axis=1), kept)
    reach = np.take_along_axis(p, kept[:, None], axis=1)
    chosen = np.minimum((p <= uniform[:, None] * reach).sum(axis=1), kept)
    # Rounding may leave the last step on a forbidden candidate: fall back to the last possible one.
    last_possible = p.shape[1] - 1 - possible[:, ::-1].argmax(axis=1)
    return np.minimum(chosen, last_possible)
