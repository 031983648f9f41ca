"""Penalties, bias and forbidden tokens of every row at once; only what has been written is touched, not the vocabulary.

Order: repetition, frequency, presence, bias; then log-softmax; then suppressed tokens, and n-grams that would repeat.

Shapes: B rows, T longest output, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.requests import Adjustments

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Numbers = NDArray[np.int32]

_MOST_LOST = 0.9
"""A row whose changed tokens had more of the probability than this is summed up again."""


class AdjustmentTable:
    """The adjustments of the live requests: arrays of one entry per group number, lists where their lengths differ."""

    def __init__(self, capacity: int) -> None:
        self._repetition = np.ones(capacity, np.float32)
        self._frequency = np.zeros(capacity, np.float32)
        self._presence = np.zeros(capacity, np.float32)
        self._ngram = np.zeros(capacity, np.int32)
        self._reweighs = np.zeros(capacity, bool)
        self._bias: dict[int, tuple[Ids, Floats]] = {}
        self._suppressed: dict[int, Ids] = {}

    def add(self, number: int, adjustments: Adjustments) -> None:
        self._repetition[number] = adjustments.repetition_penalty
        self._frequency[number] = adjustments.frequency_penalty
        self._presence[number] = adjustments.presence_penalty
        self._ngram[number] = adjustments.no_repeat_ngram
        self._reweighs[number] = adjustments.reweighs
        if adjustments.token_bias:
            ids, values = zip(*adjustments.token_bias, strict=True)
            self._bias[number] = np.array(ids, np.int64), np.array(values, np.float32)
        if adjustments.suppressed_tokens:
            self._suppressed[number] = np.array(adjustments.suppressed_tokens, np.int64)

    def remove(self, number: int) -> None:
        self._bias.pop(number, None)
        self._suppressed.pop(number, None)

    def reweigh(self, logits: Floats, shift: Floats, group: Ids, tokens: Numbers, length: Ids) -> Floats:
        """The log-probabilities [B, V] of the adjusted distributions, before anything is forbidden.

        Args:
            logits: [B, V]. shift: [B] makes log-probabilities of them. group: [B]. tokens: [B, T] written so far. length: [B].
        """
        log_p = logits + shift[:, None]
        chosen = np.flatnonzero(self._reweighs[group])
        if not len(chosen):
            return log_p
        vocab_size, group = logits.shape[1], group[chosen]
        row, token, count = written_counts(tokens[chosen], length[chosen], vocab_size)
        own, row = group[row], chosen[row]
        value, penalty = logits[row, token], self._repetition[own]
        value = np.where(value > 0, value / penalty, value * penalty)
        value = value - self._frequency[own] * count - self._presence[own] + shift[row]
        changed = [row * vocab_size + token]
        biased = [(chosen[i], *self._bias[number]) for i, number in enumerate(group.tolist()) if number in self._bias]
        changed += [row * vocab_size + ids for row, ids, _ in biased]
        cell = np.unique(np.concatenate(changed))
        cell_row, before = cell // vocab_size, log_p.reshape(-1)[cell]
        log_p[row, token] = value
        for one, ids, gain in biased:
            log_p[one, ids] += gain
        # Only these cells have another probability, so the sum over the vocabulary follows from theirs.
        after = log_p.reshape(-1)[cell]
        lost = np.bincount(cell_row, np.exp(before, dtype=np.float64), len(log_p))[chosen]
        gained = np.bincount(cell_row, np.exp(after, dtype=np.float64), len(log_p))[chosen]
        whole = 1 - lost + gained
        for i in np.flatnonzero(lost > _MOST_LOST).tolist():  # little is left of 1, and that imprecise
            whole[i] = np.exp(log_p[chosen[i]], dtype=np.float64).sum()
        surplus = np.zeros(len(log_p), np.float32)
        surplus[chosen] = np.log(whole)
        log_p -= surplus[:, None]
        return log_p

    def suppress(self, log_p: Floats, group: Ids) -> None:
        """Makes -inf of what a row's request [B] suppresses."""
        for number in self._suppressed.keys() & set(group.tolist()):
            log_p[np.ix_(np.flatnonzero(group == number), self._suppressed[number])] = -np.inf

    def forbid_repeats(self, log_p: Floats, group: Ids, tokens: Numbers, length: Ids) -> None:
        """Makes -inf of tokens that would repeat an n-gram; not in a row where nothing else is left. Comes last."""
        sizes = self._ngram[group]
        for size in np.unique(sizes[sizes > 0]).tolist():
            chosen = np.flatnonzero(sizes == size)
            row, token = repeating_tokens(tokens[chosen], length[chosen], size)
            row = chosen[row]
            before = log_p[row, token]
            log_p[row, token] = -np.inf
            touched, of = np.unique(row, return_inverse=True)
            stuck = np.isneginf(log_p[touched].max(axis=1, initial=-np.inf))[of]
            log_p[row[stuck], token[stuck]] = before[stuck]


def written_counts(tokens: Numbers, length: Ids, vocab_size: int) -> tuple[Ids, Ids, Ids]:
    """How often each row [B] has written what: flat arrays of row, token and count, each pair once."""
    longest = int(length.max(initial=0))
    row, place = np.nonzero(np.arange(longest) < length[:, None])
    key, count = np.unique(row * vocab_size + tokens[row, place], return_counts=True)
    return key // vocab_size, key % vocab_size, count


def repeating_tokens(tokens: Numbers, length: Ids, size: int) -> tuple[Ids, Ids]:
    """The tokens with which a row [B] would write a sequence of ``size`` tokens again: flat arrays of row and token."""
    rows, longest = len(tokens), int(length.max(initial=0))
    starts = longest - size + 1
    if starts <= 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # A row shorter than size - 1 has no starts below, so what its (negative) indices read does not matter.
    last = tokens[np.arange(rows)[:, None], length[:, None] - (size - 1) + np.arange(size - 1)]  # [B, size - 1]
    repeats = np.arange(starts) + size <= length[:, None]  # [B, starts]: begins a sequence that has been written
    for i in range(size - 1):
        repeats &= tokens[:, i : i + starts] == last[:, i : i + 1]
    row, start = np.nonzero(repeats)
    return row, tokens[row, start + size - 1].astype(np.int64)
