"""Caches by pointers and pitches (as on a CUDA device) hold what numpy caches hold."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest

from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.caches import CacheLayout, DeviceCaches
from server.device.runtime import SequenceRuntime, SessionSettings
from tests import tiny
from tests.server.batch.test_engine import FAMILIES, expected, random_request, run


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


@pytest.mark.parametrize("family", FAMILIES)
def test_device_caches_serve_what_the_reference_decoder_gives(family: str) -> None:
    config, rows = tiny.shape(family), 12
    shape = SequenceShape.from_config(config.to_dict())
    caches = DeviceCaches(CacheLayout.of(shape, rows, "float32"), HostAsDevice())
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
