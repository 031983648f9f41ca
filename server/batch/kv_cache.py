"""Which rows of the caches are live. Numbers only; the memory belongs to ``runtime``.

A row is one live hypothesis. Live rows are always the prefix [0, n) of the caches, so that a decode step runs on a view and
does no padded work: when rows end, the last ones move into their places.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]


class Moves(NamedTuple):
    """Rows to move, source[i] to target[i]. No target is a source, so the order does not matter."""

    source: Rows
    target: Rows


class RowTable:
    """Hands out rows at the end of the live prefix and closes the gaps when rows leave."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.live = 0

    @property
    def free(self) -> int:
        return self.capacity - self.live

    def join(self, count: int) -> Rows:
        """The next ``count`` rows.

        Raises:
            ValueError: when fewer are free.
        """
        if count > self.free:
            raise ValueError(f"{count} rows asked for, {self.free} free")
        rows = np.arange(self.live, self.live + count)
        self.live += count
        return rows

    def leave(self, rows: Rows) -> Moves:
        """Gives up ``rows`` (live, each once); the caller must carry out the moves before the next step."""
        leaving, live = set(rows.tolist()), self.live
        self.live = remaining = live - len(leaving)
        target = sorted(row for row in leaving if row < remaining)
        source = [row for row in range(remaining, live) if row not in leaving]
        return Moves(np.array(source, np.intp), np.array(target, np.intp))
