"""What a profile is said to mean adds up."""

from __future__ import annotations

import pytest

from tests.bench.where import BETWEEN, OTHERS, Seconds, missed


def test_all_of_the_time_is_somewhere() -> None:
    split = Seconds(all=10.0, runtime=8.0, encoding=2.0).split({"QGemm": 2.0, "TopK": 1.0, "Add": 0.5, "Unheard": 0.5})
    assert sum(split.values()) == pytest.approx(1.0)
    assert (split["the engine itself"], split["encoding"], split["products"], split["softmax and search"]) == (
        0.2,
        0.2,
        0.2,
        0.1,
    )
    assert (split[OTHERS], split[BETWEEN], split["attention"]) == (pytest.approx(0.1), pytest.approx(0.2), 0.0)


def test_a_slower_run_under_the_profiler_gives_proportions_alone() -> None:
    split = Seconds(all=10.0, runtime=8.0, encoding=2.0).split({"QGemm": 9.0, "GroupQueryAttention": 3.0})
    assert sum(split.values()) == pytest.approx(1.0)
    assert (split["products"], split["attention"], split[BETWEEN]) == (pytest.approx(0.45), pytest.approx(0.15), 0.0)


@pytest.mark.parametrize(
    ("concurrency", "ratio", "expected"), [(1, 3.9, True), (1, 4.0, False), (8, 1.49, True), (8, 1.5, False), (8, None, False)]
)
def test_a_point_misses_its_own_goal(concurrency: int, ratio: float | None, expected: bool) -> None:
    assert missed({"concurrency": concurrency, "ratio": ratio}, 1.5, 4.0) is expected
