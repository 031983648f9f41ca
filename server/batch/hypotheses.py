"""What every live row has written so far: one array per quantity, one entry per row, so that a step touches all rows at once.

A *group* is the rows of one request; group numbers are stable, row numbers are not (rows move when others end).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.batch.kv_cache import Rows


@dataclass(slots=True)
class Hypotheses:
    """Arrays of one entry per row; R is the row capacity, T the longest output."""

    numbers: NDArray[np.int64]
    """[5, R]: the five that follow are its rows, so that they move, or grow, in one call; a step on a small model is so short
    that every call tells."""
    length: NDArray[np.int64]
    """[R] output tokens so far."""
    position: NDArray[np.int64]
    """[R] where the next token stands."""
    next_token: NDArray[np.int64]
    """[R] fed to the model in the next step."""
    group: NDArray[np.int64]
    """[R] the request."""
    member: NDArray[np.int64]
    """[R] which hypothesis of the request."""
    total: NDArray[np.float32]
    """[R] sum of their log-probabilities; -inf marks a beam with nothing in it."""
    tokens: NDArray[np.int32]
    """[R, T]."""
    log_probabilities: NDArray[np.float32]
    """[R, T]."""
    draws: NDArray[np.float64]
    """[R, T] the uniform number that each step of a sampled row consumes."""

    @classmethod
    def empty(cls, rows: int, longest: int) -> Hypotheses:
        numbers = np.zeros((5, rows), np.int64)
        length, position, next_token, group, member = numbers
        return cls(
            numbers=numbers,
            length=length,
            position=position,
            next_token=next_token,
            group=group,
            member=member,
            total=np.zeros(rows, np.float32),
            tokens=np.zeros((rows, longest), np.int32),
            log_probabilities=np.zeros((rows, longest), np.float32),
            draws=np.zeros((rows, longest), np.float64),
        )

    def move(self, source: Rows, target: Rows) -> None:
        """Row source[i] becomes row target[i]."""
        self.numbers[:, target] = self.numbers[:, source]
        for array in (self.total, self.tokens, self.log_probabilities, self.draws):
            array[target] = array[source]

    def branch(self, source: Rows, target: Rows) -> None:
        """What row source[i] has written is now also what row target[i] has written; target keeps its group and member."""
        if not len(source):
            return
        lengths = self.length.take(source)
        longest = int(lengths.max())
        self.position[target] = self.position.take(source)
        self.length[target] = lengths
        self.total[target] = self.total.take(source)
        self.tokens[target, :longest] = self.tokens[source, :longest]
        self.log_probabilities[target, :longest] = self.log_probabilities[source, :longest]

    def shared(self, first: Rows, second: Rows) -> Rows:
        """How many positions of rows first[i] and second[i], of one request, were fed the same tokens from the beginning."""
        length = self.length.take(first)
        common = np.minimum(length, self.length.take(second))
        longest = int(common.max(initial=0))
        parted = np.empty((len(first), longest + 1), bool)
        np.not_equal(self.tokens[first, :longest], self.tokens[second, :longest], out=parted[:, :longest])
        parted |= np.arange(longest + 1) >= common[:, None]
        return self.position.take(first) - length + 1 + parted.argmax(axis=1)

    def append(self, rows: Rows, tokens: NDArray[np.int64], log_probabilities: NDArray[np.float32]) -> None:
        """Row rows[i] writes tokens[i]."""
        at = self.length.take(rows)
        self.tokens[rows, at] = tokens
        self.log_probabilities[rows, at] = log_probabilities
        self.total[rows] += log_probabilities
        self.length[rows] = at + 1
        self.next_token[rows] = tokens
        self.position[rows] += 1

    def append_to_all(self, rows: Rows, tokens: NDArray[np.int64], log_probabilities: NDArray[np.float32]) -> None:
        """``append`` for rows 0, 1, ... n - 1. Totals are left as they are: greedy rows do not need them."""
        n = len(rows)
        at = self.length[:n]
        self.tokens[rows, at] = tokens
        self.log_probabilities[rows, at] = log_probabilities
        self.next_token[:n] = tokens
        self.numbers[:2, :n] += 1  # length and position

    def written(self, row: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Tokens and log-probabilities of one row."""
        length = self.length[row]
        return tuple(self.tokens[row, :length].tolist()), tuple(self.log_probabilities[row, :length].tolist())
