"""The memory of the decode graph's caches: keys and values of every row, on the host or on a CUDA device.

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


class Room:
    """How many positions each row has room for: little more than the longest row needs.

    Attention reads one run of memory for each row and head. Where runs touch, the processor sees one long stream and fetches
    ahead; with gaps between them every run begins with waiting, which on a small model is up to a quarter of a step.
    """

    PATIENCE = 1024
    """Steps without a long row after which there is less room."""

    def __init__(self, largest: int, unit: int) -> None:
        self._largest, self._unit = largest, unit
        self.positions = min(largest, unit)
        self._longest, self._steps = 0, 0

    def fit(self, length: int) -> bool:
        """Whether ``positions`` has changed, for rows of at most ``length``."""
        before, self._steps, self._longest = self.positions, self._steps + 1, max(self._longest, length)
        if length > self.positions:
            self.positions = self._rounded(length)
        elif self._steps >= self.PATIENCE:
            if (less := self._rounded(self._longest)) <= 0.75 * self.positions:  # what is worth copying everything for
                self.positions = less
            self._longest, self._steps = length, 0
        return self.positions != before

    def _rounded(self, length: int) -> int:
        return min(self._largest, max(1, -(-length // self._unit)) * self._unit)


class HostArray:
    """Keys and values of all layers in numpy, laid out anew when the room of its rows changes.

    Attributes:
        array: [L, 2, R, G, C, K], C as much as there is room for.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], unit: int) -> None:
        self._shape, self._room = shape, Room(shape[4], unit)
        # Zeroed lazily by the operating system: a page takes memory when a row first reaches it.
        self._memory = np.zeros(math.prod(shape), dtype)
        self.array = self._laid_out()

    def reserve(self, length: int, rows: int) -> bool:
        """As ``Caches.reserve``."""
        if not self._room.fit(length):
            return False
        kept = min(self.array.shape[4], self._room.positions)
        live, staging = self.array[:, :, :rows, :, :kept].copy(), self.array[:, :, -1:, :, :kept].copy()
        self.array = self._laid_out()
        self.array[:, :, -1:, :, :kept] = staging
        self.array[:, :, :rows, :, :kept] = live
        return True

    def _laid_out(self) -> Array:
        shape = (*self._shape[:4], self._room.positions, self._shape[5])
        return self._memory[: math.prod(shape)].reshape(shape)


class HostCaches:
    """Caches in numpy arrays.

    Args:
        unit: target positions by which there comes to be more room, for targets grow step by step. (Sources come as they are.)
    """

    def __init__(self, layout: CacheLayout, unit: int = 16) -> None:
        self._dtype = layout.dtype
        self._self = HostArray(layout.self_shape, layout.dtype, unit)
        self._cross = HostArray(layout.cross_shape, layout.dtype, unit=1)

    def reserve(self, target: int, source: int, rows: int) -> bool:
        changed = self._self.reserve(target, rows), self._cross.reserve(source, rows)
        return any(changed)

    def views(self, rows: slice) -> Iterator[Bound]:
        self_, cross = self._self.array, self._cross.array
        return CacheLayout(self_.shape, cross.shape, self._dtype).views((self_.ctypes.data, cross.ctypes.data), rows)

    def write_source(self, rows: Sequence[Rows], cross: Any) -> None:
        encoded, memory = cross.numpy(), self._cross.array
        longest = encoded.shape[4]
        first, each = rows[0][0], len(rows[0])
        if rows[-1][-1] - first == len(rows) * each - 1 and all(len(own) == each for own in rows):  # neighbours, alike
            block = memory[:, :, first : first + len(rows) * each, :, :longest]
            layers, kinds, _, *rest = block.shape
            block.reshape(layers, kinds, len(rows), each, *rest, copy=False)[:] = encoded[:, :, :, None]
        else:
            for i, own in enumerate(rows):
                memory[:, :, own, :, :longest] = encoded[:, :, i, None]

    def adopt(self, rows: Rows, length: int) -> None:
        memory = self._self.array
        memory[:, :, rows, :, :length] = memory[:, :, -1:, :, :length]

    def branch(self, source: Rows, target: Rows, start: Array, stop: Array) -> None:
        memory = self._self.array
        for s, t, begin, end in zip(source.tolist(), target.tolist(), start.tolist(), stop.tolist(), strict=True):
            memory[:, :, t, :, begin:end] = memory[:, :, s, :, begin:end]

    def move(self, source: Rows, target: Rows, length: int, source_length: int) -> None:
        _copy_rows(self._self.array, source, target, length)
        if source_length:
            _copy_rows(self._cross.array, source, target, source_length)


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

    def reserve(self, target: int, source: int, rows: int) -> bool:
        return False  # there is always room for the longest

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
