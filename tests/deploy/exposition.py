"""The series that the server really exposes, read from a scrape."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.batch.step_stats import StepStats
from server.call import Call, Outcome
from server.engines.engine_client import EngineStatus
from server.metrics import Metrics
from server.models import ServedModel

STEP = StepStats(
    seconds=0.01,
    runtime_seconds=0.008,
    rows=4,
    new_tokens=4,
    joined=("a",),
    encoded_tokens=12,
    live_requests=3,
    live_rows=4,
    row_capacity=64,
    waiting_requests=2,
    waiting_tokens=20,
    queue_seconds=(0.001,),
)


@dataclass(slots=True)
class Series:
    """One name, as it appears in a scrape."""

    values: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Every label, with the values seen."""


def scrape() -> str:
    """What ``/metrics`` answers after a call or two."""
    metrics = Metrics("0")
    engine = SimpleNamespace(status=EngineStatus(alive=True, live_rows=4, waiting_requests=2, waiting_tokens=20))
    facts = {"family": "encoder_decoder", "task": "dates", "precision": "fp32", "device": "cpu", "fingerprint": "aa"}
    metrics.add_model(cast(ServedModel, cast(Any, SimpleNamespace(name="dates", engine=engine, **facts))))
    metrics.set_ready(True)
    for outcome in Outcome:
        for method in ("Generate", "GenerateStream"):
            metrics.call_ended(Call(method=method, request_id="1", model="dates", outcome=outcome))
    metrics.step_done("dates", STEP)
    return generate_latest(metrics.registry).decode()


@functools.cache
def exposed() -> dict[str, Series]:
    found: defaultdict[str, Series] = defaultdict(Series)
    for family in text_string_to_metric_families(scrape()):
        for sample in family.samples:
            one = found[sample.name]
            for label, value in sample.labels.items():
                one.values[label].add(value)
    return dict(found)
