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

from server.kv_cache import Rows
from server.sequence_model import SequenceShape

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Bound:
    """One tensor of a binding: where it lies and what shape a graph sees."""

    name: str
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
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
    """Shapes and types of the three arrays: self-attention, cross-attention, and the newest source position."""

    self_shape: tuple[int, ...]
    """[L, 2, R + 1 (the staging row, without an encoder), G, C, K]."""
    cross_shape: tuple[int, ...]
    """[L, 2, R, G, S, K]."""
    newest_shape: tuple[int, ...]
    """[R, L, 2, G K]."""
    cache_type: np.dtype[Any]
    """Of the first two."""
    newest_type: np.dtype[Any]
    """As activations are: beside int8 caches it stays float32."""

    @classmethod
    def of(cls, shape: SequenceShape, rows: int, precision: str) -> CacheLayout:
        s = shape
        staging, cross_rows = (0, rows) if s.has_encoder else (1, 0)
        cache_type, newest_type = _TYPES[precision]
        return cls(
            (s.layers, 2, rows + staging, s.kv_heads, s.longest_target, s.head_width),
            (s.layers, 2, cross_rows, s.kv_heads, s.longest_source, s.head_width),
            (cross_rows, s.layers, 2, s.kv_heads * s.head_width),
            np.dtype(cache_type),
            np.dtype(newest_type),
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of the three arrays."""
        cache, newest = self.cache_type.itemsize, self.newest_type.itemsize
        return math.prod(self.self_shape) * cache, math.prod(self.cross_shape) * cache, math.prod(self.newest_shape) * newest

    def views(self, pointers: tuple[int, int, int], rows: slice) -> Iterator[Bound]:
        """The tensors of the decode graph on ``rows``, given where the three arrays begin."""
        count = rows.stop - rows.start
        for kind, shape, pointer in (("self", self.self_shape, pointers[0]), ("cross", self.cross_shape, pointers[1])):
            layers, _, capacity, *rest = shape
            row_bytes = math.prod(rest) * self.cache_type.itemsize
            for layer in range(layers if capacity else 0):
                for i, what in enumerate(("key", "value")):
                    begin = ((2 * layer + i) * capacity + rows.start) * row_bytes
                    yield Bound(f"{kind}_{what}_{layer}", pointer + begin, (count, *rest), self.cache_type, in_place=True)
        if self.newest_shape[0]:
            each = self.newest_shape[1:]
            begin = rows.start * math.prod(each) * self.newest_type.itemsize
            yield Bound("newest", pointers[2] + begin, (count, *each), self.newest_type, in_place=False)


_TYPES: dict[str, tuple[type, type]] = {
    "fp32": (np.float32, np.float32),
    "fp16": (np.float16, np.float16),
    "int8": (np.int8, np.float32),
}


class HostCaches:
    """Caches in numpy arrays."""

    def __init__(self, layout: CacheLayout) -> None:
        self._layout = layout
        # Zeroed lazily by the operating system: a page takes memory when a row first reaches it.
        self._self = np.zeros(layout.self_shape, layout.cache_type)
        self._cross = np.zeros(layout.cross_shape, layout.cache_type)
        self._newest = np.zeros(layout.newest_shape, layout.newest_type)

    def views(self, rows: slice) -> Iterator[Bound]:
        pointers = self._self.ctypes.data, self._cross.ctypes.data, self._newest.ctypes.data
        return self._layout.views(pointers, rows)

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

    def __init__(self, layout: CacheLayout, memory: DeviceMemory) -> None:
        self._layout, self._memory = layout, memory
        first, second, third = (memory.allocate(max(1, size)) for size in layout.sizes)
        self._pointers = first, second, third

    def views(self, rows: slice) -> Iterator[Bound]:
        return self._layout.views(self._pointers, rows)

    def write_source(self, rows: Sequence[Rows], lengths: Array, outputs: Sequence[Any]) -> None:
        *caches, newest = outputs
        _, _, capacity, heads, longest, width = self._layout.cross_shape
        _, cross, newest_begin = self._pointers
        pitch = longest * width * self._layout.cache_type.itemsize  # of one head in the cache
        run = caches[0].shape()[2] * width * self._layout.cache_type.itemsize  # of one head in what encode gave
        size = math.prod(self._layout.newest_shape[1:]) * self._layout.newest_type.itemsize
        for i, own in enumerate(rows):
            for row in own.tolist():
                for j, cache in enumerate(caches):
                    target = cross + (j * capacity + row) * heads * pitch
                    self._memory.copy(target, pitch, cache.data_ptr() + i * heads * run, run, run, heads)
                self._memory.copy(newest_begin + row * size, size, newest.data_ptr() + i * size, size, size, 1)
        self._memory.synchronize()

    def adopt(self, rows: Rows, length: int) -> None:
        staging = np.full(len(rows), self._layout.self_shape[2] - 1)
        self._copy_rows(0, staging, rows)
        self._memory.synchronize()

    def branch(self, source: Rows, target: Rows, length: int) -> None:
        self._copy_rows(0, source, target)
        self._memory.synchronize()

    def move(self, source: Rows, target: Rows, length: int, source_length: int) -> None:
        for which in range(3 if self._layout.newest_shape[0] else 1):
            self._copy_rows(which, source, target)
        self._memory.synchronize()

    def _copy_rows(self, which: int, source: Rows, target: Rows) -> None:
        """Rows of one of the three arrays, of all layers, keys and values alike, in one copy each."""
        layout = self._layout
        shape = (layout.self_shape, layout.cross_shape, (1, 1, *layout.newest_shape))[which]
        planes, capacity = shape[0] * shape[1], shape[2]
        row = layout.sizes[which] // (planes * capacity)
        begin, pitch = self._pointers[which], capacity * row
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            self._memory.copy(begin + t * row, pitch, begin + s * row, pitch, row, planes)
