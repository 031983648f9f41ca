"""Caches lose nothing when they are laid out anew; by pointers and pitches, as on a CUDA device, they hold the same."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime import OrtValue

from server.batch.engine import Engine
from server.batch.kv_cache import Rows
from server.batch.sequence_model import SequenceShape
from server.device.caches import CacheLayout, Caches
from server.device.device_caches import DeviceCaches
from server.device.host_caches import HostArray, HostCaches, Room
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from tests import tiny
from tests.server.batch.requests import FAMILIES, expected, random_request, run


class HostAsDevice:
    """A DeviceMemory whose device is the host."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def allocate(self, size: int) -> int:
        self.blocks.append(np.zeros(size, np.uint8))
        return self.blocks[-1].ctypes.data

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        for i in range(height):
            np.copyto(_bytes(target + i * target_pitch, width), _bytes(source + i * source_pitch, width))

    def synchronize(self) -> None:
        pass


def _bytes(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


ROWS = 12


def layout(family: str) -> CacheLayout:
    return CacheLayout.of(SequenceShape.from_config(tiny.shape(family).to_dict()), ROWS, "float32")


class GivenOnTheHost(DeviceCaches):
    """What ``encode`` gives lies on a device, too, where there is one."""

    def write_source(self, rows: Sequence[Rows], cross: np.ndarray) -> None:
        super().write_source(rows, OrtValue.ortvalue_from_numpy(cross))


@pytest.mark.parametrize("family", FAMILIES)
def test_device_caches_serve_what_the_reference_decoder_gives(family: str) -> None:
    serves_what_the_reference_gives(family, GivenOnTheHost(layout(family), HostAsDevice()))


class Watched(HostCaches):
    """Notes how much room there was."""

    def __init__(self, layout: CacheLayout) -> None:
        super().__init__(layout, unit=2)
        self.rooms: list[tuple[int, int]] = []

    def reserve(self, target: int, source: int, rows: int) -> bool:
        changed = super().reserve(target, source, rows)
        self.rooms.append((self._self.array.shape[4], self._cross.array.shape[4]))
        return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_laid_out_anew_under_the_running_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "PATIENCE", 3)
    caches = Watched(layout(family))
    serves_what_the_reference_gives(family, caches)
    targets, sources = (np.diff(room) for room in zip(*caches.rooms, strict=True))
    assert (targets > 0).sum() > 3, "there came to be more room"
    assert (targets < 0).sum() > 3, "and less"
    if family == "encoder_decoder":
        assert (sources > 0).sum() > 3
        assert (sources < 0).sum() > 3


def serves_what_the_reference_gives(family: str, caches: Caches) -> None:
    config, rows = tiny.shape(family), ROWS
    shape = SequenceShape.from_config(config.to_dict())
    runtime = SequenceRuntime(tiny.graphs(config), shape, rows, SessionSettings(threads=1), caches)
    engine = Engine(runtime, start_token=1, end_token=2, join_tokens=24)
    rng = random.Random(5)
    requests = [random_request(rng, f"r{i}") for i in range(60)]
    events = run(engine, requests, rng)
    for request in requests:
        found = [list(h.tokens) for h in events[request.id][-1].hypotheses]
        assert found == [h.tokens for h in expected(family, request)]


def test_layout_counts_every_byte() -> None:
    shape = SequenceShape(layers=2, kv_heads=3, head_width=8, vocab_size=10, longest_target=5, longest_source=7)
    self_, cross = 2 * 2 * 4 * 3 * 5 * 8, 2 * 2 * 4 * 3 * 7 * 8
    assert CacheLayout.of(shape, 4, "float32").sizes == (4 * self_, 4 * cross)
    assert CacheLayout.of(shape, 4, "int8").sizes == (self_, cross)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=30))
def test_what_rows_hold_stays_when_they_are_laid_out_anew(wanted: list[tuple[int, int]]) -> None:
    """As many rows as are live, and the last one, keep as many positions as they had."""
    array, held = HostArray((2, 2, 5, 3, 20, 4), np.dtype(np.int8), unit=3), np.zeros((2, 2, 5, 3, 20, 4), np.int8)
    array._room.PATIENCE = 2  # type: ignore[misc]
    rng, before = np.random.default_rng(0), 0
    for length, rows in wanted:
        array.reserve(max(length, before), rows)  # those that live are never longer than what is asked for
        kept = min(before, array.array.shape[4])
        for live in (slice(0, rows), slice(-1, None)):
            assert (array.array[:, :, live, :, :kept] == held[:, :, live, :, :kept]).all()
        held[..., :length, :] = array.array[..., :length, :] = rng.integers(-128, 128, (2, 2, 5, 3, length, 4))
        before = length


def test_there_is_room_at_once_and_less_only_after_a_while() -> None:
    room = Room(100, unit=16)
    assert [room.fit(length) for length in (1, 16, 17, 16)] == [False, False, True, False]
    assert room.positions == 32
    assert room.fit(99)
    assert room.positions == 100, "never more than the longest"
    assert not any(room.fit(20) for _ in range(Room.PATIENCE - 6)), "the long one is not long ago"
    assert [room.fit(20) for _ in range(2 * Room.PATIENCE)].count(True) == 1
    assert room.positions == 32


def test_a_little_less_is_not_worth_the_copy() -> None:
    room = Room(100, unit=1)
    room.fit(40)
    assert not any(room.fit(31) for _ in range(3 * Room.PATIENCE))
    assert any(room.fit(30) for _ in range(2 * Room.PATIENCE))
    assert room.positions == 30
