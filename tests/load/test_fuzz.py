"""A short form of ``python -m tests.load.fuzz``, and that it can find what it looks for."""

from __future__ import annotations

import ctypes
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from server.edge import convert
from tests.load.fuzz.attack import Report, attack
from tests.load.fuzz.calls import request_of
from tests.load.fuzz.in_process import through_the_service
from tests.load.fuzz.mutation import METHODS, mutate_field, valid_request
from tests.load.memory import WARM_BYTES
from tests.load.running import Resting, anonymous_bytes, server_process
from tests.load.watched_server import COUNTED, give_back

FLAGS = ("--device", "cpu", "--engines", "1", "--threads", "1", "--max-rows", "8")


async def test_strangers_do_no_harm(bundles: dict[str, Path]) -> None:
    async with server_process(*bundles.values(), *FLAGS, module="tests.load.watched_server", environment=COUNTED) as server:
        report = await attack(server, 1, calls=range(600), abuses=range(28))
    assert report.problems == []
    assert report.calls.total() == 600
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= report.calls.keys()
    assert len(report.connections) == 14
    assert report.songs > 3
    assert report.begun > 1000
    assert report.growth < report.growth_allowed
    assert report.after is not None
    assert 0 < report.given_back < report.after.memory + 2**20


def test_what_calls_that_were_left_explain_is_no_growth() -> None:
    before = Resting(descriptors=1, tasks=1, threads=1, memory=0, in_use=0)
    report = Report(calls=Counter(OK=900_000, CANCELLED=100_000), begun=0, before=before)
    report.after = replace(before, in_use=WARM_BYTES + 25_000_000)
    assert report.growth < report.growth_allowed
    report.after = replace(before, in_use=WARM_BYTES + 26_000_000)
    assert report.growth > report.growth_allowed


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_what_malloc_keeps_of_a_burst_is_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, pieces = 64 * 2**10, list[int]()
    for _ in range(1000):
        pieces.append(libc.malloc(size))
        ctypes.memset(pieces[-1], 1, size)
    last = pieces.pop()  # while it lies at the end, malloc keeps all that is before it
    for piece in pieces:
        libc.free(piece)
    before = anonymous_bytes(os.getpid())
    give_back()
    assert anonymous_bytes(os.getpid()) < before - 40 * 2**20
    libc.free(last)


async def test_no_request_is_a_fault_of_the_service() -> None:
    ends, problems = await through_the_service(1, range(3000))
    assert problems == []
    assert ends["answered"] > 300
    assert ends["INVALID_REQUEST"] > 300


async def test_a_fault_of_the_service_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_decimal", lambda value: 1 / value)
    _, problems = await through_the_service(1, range(2000))
    assert problems
    assert "ZeroDivisionError" in problems[0]


def test_a_number_makes_the_same_request_again() -> None:
    assert [request_of(1, number) for number in range(200)] == [request_of(1, number) for number in range(200)]
    assert request_of(1, 7) != request_of(2, 7)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_field_of_a_request_is_mutated(method) -> None:  # type: ignore[no-untyped-def]
    rng, changed = random.Random(1), set[str]()
    for _ in range(300):
        before, after = (valid_request(random.Random(2), method) for _ in range(2))
        mutate_field(rng, after)
        changed |= {field.name for field in method.input_type.fields if _differs(before, after, field.name)}
    assert changed == set(method.input_type.fields_by_name)


def _differs(one, other, name: str) -> bool:  # type: ignore[no-untyped-def]
    return repr(getattr(one, name)) != repr(getattr(other, name))
