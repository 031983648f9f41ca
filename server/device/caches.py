"""The memory of the decode graph's caches: keys and values of every row, as the runtime sees it.

One array holds all layers of a kind, so that rows are copied for all of them at once. ``HostCaches`` is numpy; ``DeviceCaches``
is the same arithmetic in pointers and pitches, for memory that numpy cannot see.

Shapes: R row capacity, L layers, G key/value heads, C capacity for target positions, S for source positions, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from server.batch.kv_cache import Rows
from server.batch.sequence_model import SequenceShape

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Bound:
    """One tensor of a binding: where it lies and what shape a graph sees. Output ``name`` + "_out" updates it in place."""

    name: str
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Caches(Protocol):
    """What a ``SequenceRuntime`` needs of cache memory. Rows are cache rows; the one after the last is the staging row."""

    def reserve(self, target: int, source: int, rows: int) -> bool:
        """Makes room for so many positions in each row. Called before anything is written there, at least once a step.

        Args:
            target, source: positions of the longest row that holds anything.
            rows: the first ``rows`` rows, and the staging row, keep what they hold.

        Returns:
            Whether tensors lie elsewhere than before: those of ``views`` are void.
        """

    def views(self, rows: slice) -> Iterator[Bound]:
        """Every cache tensor of the decode graph, on these rows."""

    def write_source(self, rows: Sequence[Rows], cross: Any) -> None:
        """Puts what ``encode`` gave for source i into every row of rows[i].

        Args:
            cross: [L, 2, B, G, S, K], an array on the host and an OrtValue on a device.
        """

    def adopt(self, rows: Rows, length: int) -> None:
        """Copies the first ``length`` target positions of the staging row into ``rows``."""

    def branch(self, source: Rows, target: Rows, start: Array, stop: Array) -> None:
        """Copies target positions start[i] to stop[i] of row source[i] to row target[i]; those before are alike."""

    def move(self, source: Rows, target: Rows, length: int, source_length: int) -> None:
        """Copies the first ``length`` target positions and ``source_length`` source positions of row source[i] to target[i]."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Shapes of the two arrays, self-attention and cross-attention, and what they hold."""

    self_shape: tuple[int, ...]
    """[L, 2, R + 1 (the staging row, without an encoder), G, C, K]."""
    cross_shape: tuple[int, ...]
    """[L, 2, R, G, S, K]."""
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, shape: SequenceShape, rows: int, dtype: str) -> CacheLayout:
        """With room for the longest target and source."""
        s = shape
        staging, cross_rows = (0, rows) if s.has_encoder else (1, 0)
        return cls(
            (s.layers, 2, rows + staging, s.kv_heads, s.longest_target, s.head_width),
            (s.layers, 2, cross_rows, s.kv_heads, s.longest_source, s.head_width),
            np.dtype(dtype),
        )

    @property
    def arrays(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of each."""
        return ("self", self.self_shape), ("cross", self.cross_shape)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the two arrays."""
        first, second = (math.prod(shape) * self.dtype.itemsize for _, shape in self.arrays)
        return first, second

    def views(self, pointers: Sequence[int], rows: slice) -> Iterator[Bound]:
        """The tensors of the decode graph on ``rows``, given where the two arrays begin."""
        count = rows.stop - rows.start
        for (kind, shape), pointer in zip(self.arrays, pointers, strict=True):
            layers, _, capacity, *rest = shape
            row_bytes = math.prod(rest) * self.dtype.itemsize
            for layer in range(layers if capacity else 0):
                for i, what in enumerate(("key", "value")):
                    begin = ((2 * layer + i) * capacity + rows.start) * row_bytes
                    yield Bound(f"{kind}_{what}_{layer}", pointer + begin, (count, *rest), self.dtype)
