"""A short form of ``python -m tests.load.soak``, and that its check tells a leak from standing still."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.load.memory import GRPC_BYTES, MOST_BYTES
from tests.load.running import Resting, server_process
from tests.load.soak import Report, Sample, front_end, soak
from tests.load.trend import slope
from tests.load.watched_server import COUNTED, PLANT_LEAK

SETTLED = Resting(descriptors=20, tasks=9, threads=14, memory=50 * 2**20, in_use=30 * 2**20)
LEAKED_BYTES = 1024


def hour(leak: float, *, samples: int = 720, calls: int = 144_000, left: int = 0) -> Report:
    """As it might have been: pools that fill up, pages that come and go, and what is kept of each call."""
    rng, report = random.Random(1), Report()
    for i in range(samples):
        done = calls * i // samples
        pools = min(1.0, 10 * i / samples) * 8 * 2**20
        in_use = round(SETTLED.in_use + pools + leak * done + rng.gauss(0, 300_000) + (rng.random() < 0.03) * 5e6)
        report.samples.append(
            Sample(seconds=5.0 * i, calls=done, front_end=replace(SETTLED, in_use=in_use), engine_memory=30 * 2**20)
        )
    report.statuses.update(OK=calls - left, CANCELLED=left)
    return report


def test_an_hour_without_a_leak_is_flat() -> None:
    assert hour(0).problems(MOST_BYTES) == []


@pytest.mark.parametrize("leak", [LEAKED_BYTES, 64])
def test_an_hour_with_a_leak_is_not(leak: int) -> None:
    report = hour(leak)
    assert report.growth(front_end).middle == pytest.approx(leak, rel=0.1)
    (problem,) = report.problems(MOST_BYTES)
    assert problem.startswith("the front end leaks")


def test_what_grpc_keeps_of_calls_that_were_left_is_allowed_for_and_no_more() -> None:
    left = 14_400
    assert hour(GRPC_BYTES * 0.1, left=left).problems(MOST_BYTES) == []
    assert hour(MOST_BYTES + GRPC_BYTES * 0.1 + 5, left=left).problems(MOST_BYTES)
    assert hour(MOST_BYTES + 5).problems(MOST_BYTES)


def test_a_run_that_is_too_short_to_tell_says_so() -> None:
    (problem,) = hour(0, samples=40, calls=2000).problems(MOST_BYTES)
    assert "too short" in problem


def test_what_was_left_open_and_wrong_ends_are_problems() -> None:
    report = hour(0)
    report.before, report.after = (20, 9), (21, 9)
    report.statuses.update({"OK": 10, "CANCELLED": 2, "INTERNAL": 1})
    assert report.problems(MOST_BYTES) == [
        "1 calls ended with INTERNAL",
        "descriptors and tasks were (20, 9) before, and (21, 9) after",
    ]


def test_a_slope_is_not_moved_by_outliers_and_lies_within_its_bounds() -> None:
    rng = random.Random(2)
    x = list(range(300))
    y = [3.0 * one + rng.gauss(0, 20) + (rng.random() < 0.1) * 5_000 for one in x]
    found = slope(x, y)
    assert found.low <= 3.0 <= found.high
    assert found.high - found.low < 0.3
    with pytest.raises(ValueError, match="5 points"):
        slope([1, 2], [1, 2])


async def test_a_planted_leak_shows_in_a_real_server(bundles: dict[str, Path]) -> None:
    leak = 2**16  # far above what a server takes to get warm, which is all that so few calls could show otherwise
    flags = ("--device", "cpu", "--engines", "1", "--threads", "1", PLANT_LEAK, str(leak))
    async with server_process(
        bundles["encoder_decoder"], *flags, module="tests.load.watched_server", environment=COUNTED
    ) as server:
        report = await soak(server, 4, rate=150, every=0.3)
    assert report.after == report.before
    assert report.statuses.keys() <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
    assert report.growth(front_end).middle == pytest.approx(leak, rel=0.3)
    assert any("front end leaks" in problem for problem in report.problems(MOST_BYTES))
