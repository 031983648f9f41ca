"""Caches in the memory of a device. Shapes as in ``server.device.caches``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from server.batch.kv_cache import Rows
from server.device.caches import Array, Bound, CacheLayout


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
