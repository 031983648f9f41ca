"""The memory of the decode graph's caches: keys and values of every row, on the host or on a CUDA device.

One array holds all layers of a kind, so that rows are copied for all of them at once. ``HostCaches`` is numpy; ``DeviceCaches``
is the same arithmetic in pointers and pitches, for memory that numpy cannot see.

Shapes: R row capacity, L layers, G key/value heads, C capacity (longest target), S longest source, K head width.
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

    def views(self, rows: slice) -> Iterator[Bound]:
        """Every cache tensor of the decode graph, on these rows."""

    def write_source(self, rows: Sequence[Rows], cross: Any) -> None:
        """Puts what ``encode`` gave for source i into every row of rows[i].

        Args:
            cross: OrtValue [L, 2, B, G, S, K].
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


class HostCaches:
    """Caches in numpy arrays."""

    def __init__(self, layout: CacheLayout) -> None:
        self._layout = layout
        # Zeroed lazily by the operating system: a page takes memory when a row first reaches it.
        self._self, self._cross = (np.zeros(shape, layout.dtype) for _, shape in layout.arrays)

    def views(self, rows: slice) -> Iterator[Bound]:
        return self._layout.views((self._self.ctypes.data, self._cross.ctypes.data), rows)

    def write_source(self, rows: Sequence[Rows], cross: Any) -> None:
        encoded = cross.numpy()
        longest = encoded.shape[4]
        first, each = rows[0][0], len(rows[0])
        if rows[-1][-1] - first == len(rows) * each - 1 and all(len(own) == each for own in rows):  # neighbours, alike
            block = self._cross[:, :, first : first + len(rows) * each, :, :longest]
            layers, kinds, _, *rest = block.shape
            block.reshape(layers, kinds, len(rows), each, *rest, copy=False)[:] = encoded[:, :, :, None]
        else:
            for i, own in enumerate(rows):
                self._cross[:, :, own, :, :longest] = encoded[:, :, i, None]

    def adopt(self, rows: Rows, length: int) -> None:
        self._self[:, :, rows, :, :length] = self._self[:, :, -1:, :, :length]

    def branch(self, source: Rows, target: Rows, start: Array, stop: Array) -> None:
        for s, t, begin, end in zip(source.tolist(), target.tolist(), start.tolist(), stop.tolist(), strict=True):
            self._self[:, :, t, :, begin:end] = self._self[:, :, s, :, begin:end]

    def move(self, source: Rows, target: Rows, length: int, source_length: int) -> None:
        _copy_rows(self._self, source, target, length)
        if source_length:
            _copy_rows(self._cross, source, target, source_length)


def _copy_rows(memory: Array, source: Rows, target: Rows, length: int) -> None:
    for s, t in zip(source.tolist(), target.tolist(), strict=True):
        memory[:, :, t, :, :length] = memory[:, :, s, :, :length]


class DeviceMemory(Protocol):
    """Raw memory of a device. Addresses are integers; copies are queued in order and done after ``synchronize``."""

    def allocate(self, size: int) -> int:
        """The address of ``size`` zeroed bytes, kept for the life of this object."""

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Copies ``height`` runs of ``width`` bytes, ``pitch`` bytes apart on each side; the two do not overlap."""

    def synchronize(self) -> None: ...


class DeviceCaches:
    """Caches in device memory. Rows are copied whole: on a device one long copy costs less than many short ones."""

    def __init__(self, layout: CacheLayout, memory: DeviceMemory) -> None:
        self._layout, self._memory = layout, memory
        self._pointers = tuple(memory.allocate(max(1, size)) for size in layout.sizes)

    def views(self, rows: slice) -> Iterator[Bound]:
        return self._layout.views(self._pointers, rows)

    def write_source(self, rows: Sequence[Rows], cross: Any) -> None:
        layers, _, capacity, heads, longest, width = self._layout.cross_shape
        sources, source_length = len(rows), cross.shape()[4]
        pitch = longest * width * self._layout.dtype.itemsize  # of one head in the cache
        run = source_length * width * self._layout.dtype.itemsize  # of one head in what encode gave
        for i, own in enumerate(rows):
            for row in own.tolist():
                for plane in range(2 * layers):
                    target = self._pointers[1] + (plane * capacity + row) * heads * pitch
                    self._memory.copy(target, pitch, cross.data_ptr() + (plane * sources + i) * heads * run, run, run, heads)
        self._memory.synchronize()

    def adopt(self, rows: Rows, length: int) -> None:
        staging = np.full(len(rows), self._layout.self_shape[2] - 1)
        self._copy_rows(0, staging, rows)
        self._memory.synchronize()

    def branch(self, source: Rows, target: Rows, start: Array, stop: Array) -> None:
        self._copy_rows(0, source, target)
        self._memory.synchronize()

    def move(self, source: Rows, target: Rows, length: int, source_length: int) -> None:
        self._copy_rows(0, source, target)
        if source_length:
            self._copy_rows(1, source, target)
        self._memory.synchronize()

    def _copy_rows(self, which: int, source: Rows, target: Rows) -> None:
        """Rows of one of the two arrays, of all layers, keys and values alike, in one copy each."""
        _, shape = self._layout.arrays[which]
        planes, capacity = shape[0] * shape[1], shape[2]
        row = self._layout.sizes[which] // (planes * capacity)
        begin, pitch = self._pointers[which], capacity * row
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            self._memory.copy(begin + t * row, pitch, begin + s * row, pitch, row, planes)
