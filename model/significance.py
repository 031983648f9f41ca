"""Is one run better than another, or was it luck? Paired bootstrap over the test examples (Koehn 2004).

Every metric here is a function of sums over examples: BLEU of n-gram counts, accuracy of hits, perplexity of log-probabilities.
So a resample of the test set is a row of counts times the examples' statistics.

Shapes: N examples, R resamples, M statistics of an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import sacrebleu
from numpy.typing import NDArray

Statistics = NDArray[np.float64]
"""[N, M]."""

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of two systems on the same examples."""

    metric: str
    ours: float
    theirs: float
    low: float
    high: float
    """The middle 95 % of ours - theirs over resampled test sets."""
    p: float
    """How often resampling alone makes a difference as large, if there is none (two-sided)."""

    @property
    def difference(self) -> float:
        return self.ours - self.theirs


def paired_bootstrap(
    metric: str, score: Callable[[NDArray[np.float64]], float], systems: Iterable[Statistics], seed: int = 12345
) -> Comparison:
    """Both systems on the same R resamples of the examples.

    Args:
        score: from the sums [M] of the examples' statistics to the metric.
        systems: the statistics of ours, then of theirs.
    """
    ours, theirs = systems
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"statistics of {ours.shape} and {theirs.shape} are not of the same examples")
    count = len(ours)
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)  # [R, N]
    differences = np.array([score(a) - score(b) for a, b in zip(counts @ ours, counts @ theirs, strict=True)])  # [R]
    observed_ours, observed_theirs = score(ours.sum(0)), score(theirs.sum(0))
    # Centred on no difference (Riezler & Maxwell 2005), as sacreBLEU does; + 1 counts the test set itself.
    extreme = np.abs(differences - differences.mean()) >= abs(observed_ours - observed_theirs)
    low, high = np.quantile(differences, [0.025, 0.975])
    p = (int(extreme.sum()) + 1) / (RESAMPLES + 1)
    return Comparison(metric, observed_ours, observed_theirs, float(low), float(high), p)


def hit_statistics(outputs: Sequence[str], targets: Sequence[str]) -> Statistics:
    """[N, 2]: right or not, and one. For accuracy and exact match."""
    return np.array([(o == t, 1.0) for o, t in zip(outputs, targets, strict=True)], dtype=np.float64)


def hit_rate(sums: NDArray[np.float64]) -> float:
    return float(100.0 * sums[0] / sums[1])


def bleu_statistics(outputs: Sequence[str], targets: Sequence[str], *, tokenized: bool) -> Statistics:
    """[N, 10]: lengths of output and target, then hits and n-grams of orders 1 to 4.

    Args:
        tokenized: as ``metrics.tokenized_bleu``; otherwise as ``metrics.bleu``.
    """
    metric = sacrebleu.BLEU(tokenize="none", force=True, lowercase=True) if tokenized else sacrebleu.BLEU()
    scores = [metric.corpus_score([o], [[t]]) for o, t in zip(outputs, targets, strict=True)]
    return np.array([(s.sys_len, s.ref_len, *s.counts, *s.totals) for s in scores], dtype=np.float64)


def bleu_score(sums: NDArray[np.float64]) -> float:
    sys_len, ref_len, *ngrams = (int(value) for value in sums)
    return float(sacrebleu.BLEU.compute_bleu(ngrams[:4], ngrams[4:], sys_len, ref_len, smooth_method="exp").score)


def perplexity_score(sums: NDArray[np.float64]) -> float:
    """Of [nats, tokens]."""
    return float(np.exp(min(sums[0] / sums[1], 700.0)))
