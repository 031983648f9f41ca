"""The judgement of ``python -m tests.load.overload``; the run itself needs a quiet machine."""

from __future__ import annotations

from tests.load.ledger import Record
from tests.load.overload import measure, problems_of, table
from tests.load.plan import Plan

PLAN = Plan(target="localhost:1", texts=["a"], seed=1, schedule=[0.0], seconds=1.0)


def records(good: int, refused: int = 0, late: int = 0, other: int = 0, refusal: float = 0.002) -> list[Record]:
    def record(code: str, seconds: float) -> Record:
        return Record(planned=0.0, sent=0.001, first=None, done=0.001 + seconds, code=code)

    return [
        *[record("OK", 0.5)] * good,
        *[record("RESOURCE_EXHAUSTED", refusal)] * refused,
        *[record("DEADLINE_EXCEEDED", 0.9)] * late,
        *[record("INTERNAL", 0.1)] * other,
    ]


def test_a_server_that_keeps_its_promises() -> None:
    stages = [measure(factor, factor * 100, PLAN, records(100, int(100 * (factor - 1)))) for factor in (1.0, 2.0, 10.0)]
    assert problems_of(stages) == []
    assert table(stages).count("\n") == 4
    assert stages[2].refusal is not None
    assert (stages[2].good, stages[2].refused, stages[2].accepted) == (100, 900, 100)


def test_what_the_core_ends_at_once_is_refused_and_what_ends_late_was_taken() -> None:
    stage = measure(2.0, 200, PLAN, [*records(100), *cancelled(0.001), *cancelled(29.5)])
    assert (stage.refused, stage.unseen, stage.expired, stage.others) == (1, 2, 1, 0)


def cancelled(seconds: float) -> list[Record]:
    return [Record(planned=0.0, sent=0.0, first=None, done=seconds, code="CANCELLED")]


def test_every_broken_promise_is_named() -> None:
    broken = [
        measure(1.0, 100, PLAN, records(100)),
        measure(2.0, 200, PLAN, records(94, 106)),
        measure(4.0, 400, PLAN, records(100, 300, refusal=0.03)),
        measure(10.0, 1000, PLAN, records(99, 900, late=1)),
        measure(10.0, 1000, PLAN, records(100, 899, other=1)),
    ]
    found = problems_of(broken)
    assert len(found) == 4
    assert found[0] == "2 x: goodput is 94.0% of its peak"
    assert "longer than 30.0 ms" in found[1]
    assert found[2:] == ["10 x: 1 of 100 accepted calls came too late", "10 x: 1 calls ended with another status"]
