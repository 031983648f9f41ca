from __future__ import annotations

import pytest

from tests.load.ledger import OK, Percentiles, Record, Slo, Summary, summarise


def record(planned: float, done: float, *, sent: float | None = None, first: float | None = None, code: str = OK) -> Record:
    return Record(planned=planned, sent=planned if sent is None else sent, first=first, done=done, code=code, tokens=5)


def summary(records: list[Record], *, seconds: float = 10.0, slo: Slo | None = None, cpu_seconds: float = 0.1) -> Summary:
    return summarise(records, offered=1.0, seconds=seconds, slo=slo or Slo(), cpu_seconds=cpu_seconds)


def test_latency_counts_from_the_planned_time() -> None:
    late = summary([record(1.0, 3.0, sent=2.9, first=2.95)])
    assert late.end_to_end and late.end_to_end.p50 == pytest.approx(2.0)
    assert late.first_token and late.first_token.p50 == pytest.approx(1.95)
    assert late.lag and late.lag.highest == pytest.approx(1.9)


def test_percentiles() -> None:
    values = Percentiles.of([float(value) for value in range(101)])
    assert values == Percentiles(p50=50.0, p90=90.0, p99=99.0, highest=100.0, count=101)
    assert Percentiles.of([]) is None


def test_failures_are_counted_by_code_and_are_no_goodput() -> None:
    stage = summary([record(0, 0.1), record(1, 1.1, code="UNAVAILABLE"), record(2, 2.1, code="UNAVAILABLE")])
    assert stage.errors == {"UNAVAILABLE": 2}
    assert (stage.requests, stage.succeeded, stage.within_slo) == (3, 1, 1)
    assert stage.end_to_end and stage.end_to_end.count == 1


def test_rates_are_over_the_time_until_the_last_answer() -> None:
    stage = summary([record(0, 1), record(9, 20)])
    assert stage.elapsed == 20
    assert stage.served == pytest.approx(0.1)
    assert stage.tokens == pytest.approx(0.5)


@pytest.mark.parametrize(("first", "done", "good"), [(0.1, 0.9, True), (0.3, 0.9, False), (0.1, 1.1, False), (None, 0.9, True)])
def test_goodput_needs_every_bound(first: float | None, done: float, good: bool) -> None:
    stage = summary([record(0, done, first=first)], slo=Slo(first_token=0.2, end_to_end=1.0))
    assert stage.within_slo == good


def test_a_late_or_busy_generator_is_called_the_bottleneck() -> None:
    calm = [record(float(i), i + 0.1) for i in range(200)]
    assert summary(calm, seconds=200).warnings == []
    late = [record(float(i), i + 0.1, sent=i + 0.05) for i in range(200)]
    assert "late by 50.0 ms" in summary(late, seconds=200).warnings[0]
    assert "90 % of a core" in summary(calm, seconds=200, cpu_seconds=180).warnings[0]


def test_nothing_sent_is_no_zero_latency() -> None:
    stage = summary([])
    assert (stage.requests, stage.end_to_end, stage.lag) == (0, None, None)
