from __future__ import annotations

import json
from pathlib import Path

from tests.load.ledger import Record, Slo, Summary, summarise
from tests.load.plot import draw
from tests.load.report import Circumstances, as_json, markdown

SLO = Slo(first_token=0.1, end_to_end=0.5)
CIRCUMSTANCES = Circumstances(
    command="python -m tests.load --sweep",
    machine="a machine",
    model="dates (encoder_decoder)",
    stream=True,
    slo=SLO,
    seconds=10,
    seed=1,
    capacity=100.0,
)


def stage(rate: float, latency: float, code: str = "OK") -> Summary:
    records = [
        Record(planned=t, sent=t, first=t + latency / 4, done=t + latency, code=code, tokens=10, gaps=(latency / 10,))
        for t in (index / rate for index in range(int(10 * rate)))
    ]
    return summarise(records, offered=rate, seconds=10, slo=SLO, cpu_seconds=1)


def test_the_table_has_a_row_for_each_rate_and_names_its_circumstances() -> None:
    text = markdown(CIRCUMSTANCES, [stage(10, 0.04), stage(100, 2.0)])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    assert "10.0 / 10.0 / 10.0" in rows[2] and "40.0 / 40.0 / 40.0" in rows[2]
    assert "2,000 / 2,000 / 2,000" in rows[3]
    for fact in ("python -m tests.load --sweep", "a machine", "dates (encoder_decoder)", "planned send time"):
        assert fact in text
    assert "met both bounds: **10 requests/s**" in text


def test_errors_are_shown_by_code() -> None:
    text = markdown(CIRCUMSTANCES, [stage(10, 0.04, code="RESOURCE_EXHAUSTED")])
    assert "100 RESOURCE_EXHAUSTED" in text
    assert "At no offered rate" in text


def test_json_holds_every_figure() -> None:
    content = json.loads(as_json(CIRCUMSTANCES, [stage(10, 0.04)]))
    assert content["stages"][0]["end_to_end"]["p99"] > 0
    assert content["slo"] == {"first_token": 0.1, "end_to_end": 0.5}


def test_the_curve_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    draw(CIRCUMSTANCES, [stage(100, 2.0), stage(10, 0.04), stage(50, 0.1, code="UNAVAILABLE")], path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
