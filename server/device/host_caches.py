"""Caches on the host, in numpy. Shapes as in ``server.device.caches``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from server.batch.kv_cache import Rows
from server.device.caches import Array, Bound, CacheLayout


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
        memory, longest = self._cross.array, cross.shape[4]
        first, each = rows[0][0], len(rows[0])
        if rows[-1][-1] - first == len(rows) * each - 1 and all(len(own) == each for own in rows):  # neighbours, alike
            block = memory[:, :, first : first + len(rows) * each, :, :longest]
            layers, kinds, _, *rest = block.shape
            block.reshape(layers, kinds, len(rows), each, *rest, copy=False)[:] = cross[:, :, :, None]
        else:
            for i, own in enumerate(rows):
                memory[:, :, own, :, :longest] = cross[:, :, i, None]

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
