"""How the configurations of a side are tried, on sides whose speed is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from tests.bench.contender import Contender, Job, Outcome, Settings
from tests.bench.peers import compare
from tests.bench.points import Lengths, Point, Precision, Shape, Strategy

CLIENTS = 4


@dataclass
class KnownSide:
    """Seconds of a request, by tuning."""

    seconds: dict[int, float]

    @property
    def settings(self) -> Settings:
        return {"threads": 1}

    def tunings(self, concurrency: int) -> Iterator[dict[str, int]]:
        yield from ({"size": size} for size in self.seconds)


@dataclass
class KnownContender:
    """Takes the time that its side says, once it is warm.

    Args:
        cold: seconds more of the first run with a tuning.
    """

    side: KnownSide
    cold: float = 0.0
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(tuning, requests) of each."""

    def run(self, job: Job) -> Outcome:
        size = job.tuning["size"]
        warm = size in (tuning for tuning, _ in self.runs)
        self.runs.append((size, len(job.sources)))
        seconds = self.side.seconds[size] * len(job.sources)
        return Outcome(seconds=seconds + (0.0 if warm else self.cold), tokens=10 * len(job.sources))


def compared(ours: KnownContender, peer: KnownContender, lengths: Lengths = Lengths.FIXED, seconds: float = 1.0) -> list[Any]:
    point = Point(shape=Shape.TINY, precision=Precision.INT8, strategy=Strategy.GREEDY, concurrency=CLIENTS, lengths=lengths)
    return compare(point, [[cast(Contender, ours)], [cast(Contender, peer)]], seconds, repeat=3)


@pytest.mark.parametrize("seconds", [0.001, 1.0], ids=["short runs", "runs longer than the sweep's"])
def test_each_side_is_measured_in_its_fastest_configuration(seconds: float) -> None:
    ours = KnownContender(KnownSide({1: 2.9 * seconds, 2: 1.1 * seconds, 3: seconds}))
    own, other = compared(ours, KnownContender(KnownSide({7: seconds})))
    assert own.config == {"threads": 1, "size": 3}
    assert other.config == {"threads": 1, "size": 7}
    assert own.rate == pytest.approx(10 / seconds)


def test_a_cold_first_run_is_not_what_counts() -> None:
    own, _ = compared(KnownContender(KnownSide({1: 0.002, 2: 0.001}), cold=0.5), KnownContender(KnownSide({7: 0.001})))
    assert own.config["size"] == 2
    assert own.rate == pytest.approx(10 / 0.001)


def test_a_slow_configuration_whose_runs_are_long_is_run_once() -> None:
    ours = KnownContender(KnownSide({1: 1.0, 2: 1.1, 3: 2.0, 4: 4.0}))
    compared(ours, KnownContender(KnownSide({7: 1.0})))
    assert [size for size, _ in ours.runs].count(4) == 1  # out of the question
    assert [size for size, _ in ours.runs].count(3) == 1  # not close
    assert [size for size, _ in ours.runs].count(2) == 2  # close: it has a second chance


@pytest.mark.parametrize(("lengths", "rounds"), [(Lengths.FIXED, 1), (Lengths.NATURAL, 3)])
def test_texts_of_natural_lengths_are_followed_by_others(lengths: Lengths, rounds: int) -> None:
    ours = KnownContender(KnownSide({1: 2.0}))
    compared(ours, KnownContender(KnownSide({7: 2.0})), lengths)
    assert ours.runs[-3:] == [(1, rounds * CLIENTS)] * 3


def test_short_runs_are_repeated_until_they_take_the_time_asked_for() -> None:
    ours = KnownContender(KnownSide({1: 0.001}))
    compared(ours, KnownContender(KnownSide({7: 0.002})), seconds=0.4)
    assert ours.runs[-1] == (1, 100 * CLIENTS)  # as long as the faster side needs
