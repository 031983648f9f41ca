"""The memory of the decode graph's caches: keys and values of every row, on the host or on a CUDA device.

One array holds all layers of a kind, so that rows are copied for all of them at once. ``HostCaches`` is numpy; ``DeviceCaches``
is the same arithmetic in pointers and pitches, for memory that numpy cannot see.

Shapes: R row capacity, L layers, G key/value heads, C capacity (longest target), S longest source, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from server.kv_cache import Rows
from server.sequence_model import SequenceShape

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Bound:
    """One tensor of a binding: where it lies and what shape a graph sees."""

    name: str
    pointer: int
    shape: tuple[int, ...]
    in_place: bool
    """Also bound as the output ``name`` + "_out"."""


class Caches(Protocol):
    """What a ``SequenceRuntime`` needs of cache memory. Rows are cache rows; the one after the last is the staging row."""

    def views(self, rows: slice) -> Iterator[Bound]:
        """Every cache tensor of the decode graph, on these rows."""

    def write_source(self, rows: Sequence[Rows], lengths: Array, outputs: Sequence[Any]) -> None:
        """Puts what ``encode`` gave for source i into every row of rows[i].

        Args:
            outputs: OrtValues cross_key_0, cross_value_0, ... each [B, G, S, K], then newest [B, L, 2, G K].
        """

    def adopt(self, rows: Rows, length: int) -> None:
        """Copies the first ``length`` target positions of the staging row into ``rows``."""

    def branch(self, source: Rows, target: Rows, length: int) -> None:
        """Copies the first ``length`` target positions of row source[i] to row target[i]."""

    def move(self, source: Rows, target: Rows, length: int, source_length: int) -> None:
        """Copies the first ``length`` target positions and ``source_length`` source positions of row source[i] to target[i]."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Shapes of the three arrays: self-attention, cross-attention, and the newest source position."""

    self_shape: tuple[int, ...]
    """[L, 2, R + 1 (the staging row, without an encoder), G, C, K]."""
    cross_shape: tuple[int, ...]
    """[L, 2, R, G, S, K]."""
    newest_shape: tuple[int, ...]
    """[R, L, 2, G K]."""

    @classmethod
    def of(cls, shape: SequenceShape, rows: int) -> CacheLayout:
        s = shape
        staging, cross_rows = (0, rows) if s.has_encoder else (1, 0)
        return cls(
            (s.layers, 2, rows + staging, s.kv_heads, s.longest_target, s.head_width),
            (s.layers, 2, cross_rows, s.kv_heads, s.longest_source, s.head_width),
            (cross_rows, s.layers, 2, s.kv_heads * s.head_width),
        )

    def bytes(self, item_size: int) -> int:
        return sum(int(np.prod(shape)) for shape in (self.self_shape, self.cross_shape, self.newest_shape)) * item_size

    def views(self, pointers: tuple[int, int, int], item_size: int, rows: slice) -> Iterator[Bound]:
        """The tensors of the decode graph on ``rows``, given where the three arrays begin."""
        count = rows.stop - rows.start
        for kind, shape, pointer in (("self", self.self_shape, pointers[0]), ("cross", self.cross_shape, pointers[1])):
            layers, _, capacity, *rest = shape
            row_bytes = int(np.prod(rest)) * item_size
            for layer in range(layers if capacity else 0):
                for i, what in enumerate(("key", "value")):
                    begin = ((2 * layer + i) * capacity + rows.start) * row_bytes
                    yield Bound(f"{kind}_{what}_{layer}", pointer + begin, (count, *rest), in_place=True)
        if self.newest_shape[0]:
            begin = rows.start * int(np.prod(self.newest_shape[1:])) * item_size
            yield Bound("newest", pointers[2] + begin, (count, *self.newest_shape[1:]), in_place=False)


class HostCaches:
    """Caches in numpy arrays."""

    def __init__(self, layout: CacheLayout, dtype: np.dtype[Any]) -> None:
        self._layout = layout
        # Zeroed lazily by the operating system: a page takes memory when a row first reaches it.
        self._self = np.zeros(layout.self_shape, dtype)
        self._cross = np.zeros(layout.cross_shape, dtype)
        self._newest = np.zeros(layout.newest_shape, dtype)

    def views(self, rows: slice) -> Iterator[Bound]:
        pointers = self._self.ctypes.data, self._cross.ctypes.data, self._newest.ctypes.data
        return self._layout.views(pointers, self._self.itemsize, rows)

    def write_source(self, rows: Sequence[Rows], lengths: Array, outputs: Sequence[Any]) -> None:
        *caches, newest = (output.numpy() for output in outputs)
        for i, own in enumerate(rows):
            length = lengths[i]
            for j, cache in enumerate(caches):
                self._cross[j // 2, j % 2, own, :, :length] = cache[i, :, :length]
            self._newest[own] = newest[i]

    def adopt(self, rows: Rows, length: int) -> None:
        self._self[:, :, rows, :, :length] = self._self[:, :, -1:, :, :length]

    def branch(self, source: Rows, target: Rows, length: int) -> None:
        _copy_rows(self._self, source, target, length)

    def move(self, source: Rows, target: Rows, length: int, source_length: int) -> None:
        _copy_rows(self._self, source, target, length)
        if self._layout.newest_shape[0]:
            _copy_rows(self._cross, source, target, source_length)
            self._newest[target] = self._newest[source]


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

    def __init__(self, layout: CacheLayout, item_size: int, memory: DeviceMemory) -> None:
        self._layout, self._item_size, self._memory = layout, item_size, memory
        shapes = (layout.self_shape, layout.cross_shape, layout.newest_shape)
        self._pointers = tuple(memory.allocate(max(1, int(np.prod(shape))) * item_size) for shape in shapes)

    def views(self, rows: slice) -> Iterator[Bound]:
        first, second, third = self._pointers
        return self._layout.views((first, second, third), self._item_size, rows)

    def write_source(self, rows: Sequence[Rows], lengths: Array, outputs: Sequence[Any]) -> None:
        *caches, newest = outputs
        _, _, capacity, heads, longest, width = self._layout.cross_shape
        pitch = longest * width * self._item_size  # of one head in the cache
        run = caches[0].shape()[2] * width * self._item_size  # of one head in what encode gave
        size = int(np.prod(self._layout.newest_shape[1:])) * self._item_size
        for i, own in enumerate(rows):
            for row in own.tolist():
                for j, cache in enumerate(caches):
                    target = self._pointers[1] + (j * capacity + row) * heads * pitch
                    self._memory.copy(target, pitch, cache.data_ptr() + i * heads * run, run, run, heads)
                self._memory.copy(self._pointers[2] + row * size, size, newest.data_ptr() + i * size, size, size, 1)
        self._memory.synchronize()

    def adopt(self, rows: Rows, length: int) -> None:
        staging = np.full(len(rows), self._layout.self_shape[2] - 1)
        self._copy_rows(0, self._layout.self_shape, staging, rows)
        self._memory.synchronize()

    def branch(self, source: Rows, target: Rows, length: int) -> None:
        self._copy_rows(0, self._layout.self_shape, source, target)
        self._memory.synchronize()

    def move(self, source: Rows, target: Rows, length: int, source_length: int) -> None:
        self._copy_rows(0, self._layout.self_shape, source, target)
        if self._layout.newest_shape[0]:
            self._copy_rows(1, self._layout.cross_shape, source, target)
            self._copy_rows(2, (1, 1, *self._layout.newest_shape), source, target)
        self._memory.synchronize()

    def _copy_rows(self, which: int, shape: tuple[int, ...], source: Rows, target: Rows) -> None:
        """Rows of all layers, keys and values alike, in one copy each."""
        layers, two, capacity, *rest = shape
        row = int(np.prod(rest)) * self._item_size
        begin, pitch = self._pointers[which], capacity * row
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            self._memory.copy(begin + t * row, pitch, begin + s * row, pitch, row, layers * two)
