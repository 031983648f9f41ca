"""From single requests to the figures of a stage. Every latency counts from the planned send time: when the server stalls, the
requests that a polite client would have held back are late too (coordinated omission)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

OK = "OK"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request; times in seconds from the start of the stage."""

    planned: float
    sent: float
    first: float | None
    """When the first piece of output arrived; None for a unary call or one that failed before it."""
    done: float
    code: str
    """A gRPC status code's name."""
    tokens: int = 0
    """Output tokens of all returned hypotheses."""
    gaps: tuple[float, ...] = ()
    """Times between consecutive pieces of the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    p50: float
    p90: float
    p99: float
    highest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """None for no values: an absent figure is not a zero."""
        if not len(values):
            return None
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return cls(p50=float(p50), p90=float(p90), p99=float(p99), highest=float(max(values)), count=len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must meet to count as goodput, in seconds."""

    first_token: float = 0.2
    end_to_end: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One stage; times in seconds, rates per second of ``elapsed``."""

    offered: float
    """Requests a second that were planned."""
    requests: int
    elapsed: float
    """From the start to the last answer, and at least the schedule's length."""
    succeeded: int
    errors: dict[str, int]
    served: float
    tokens: float
    goodput: float
    """Successful requests that met the SLO."""
    within_slo: int
    first_token: Percentiles | None
    inter_token: Percentiles | None
    end_to_end: Percentiles | None
    """Successful requests only; failures are counted under errors and lost to goodput."""
    lag: Percentiles | None
    """How late the generator itself sent."""
    generator_cpu: float
    """Share of one core that the generator used."""
    warnings: list[str] = field(default_factory=list)


def summarise(records: Sequence[Record], *, offered: float, seconds: float, slo: Slo, cpu_seconds: float) -> Summary:
    """The figures of one stage.

    Args:
        seconds: the schedule's length.
        cpu_seconds: processor time of the generator over the stage.
    """
    good = [r for r in records if r.code == OK]
    elapsed = max([seconds, *(r.done for r in records)])
    within = sum(_meets(r, slo) for r in good)
    lag = Percentiles.of([r.sent - r.planned for r in records])
    end_to_end = Percentiles.of([r.done - r.planned for r in good])
    cpu = cpu_seconds / elapsed
    return Summary(
        offered=offered,
        requests=len(records),
        elapsed=elapsed,
        succeeded=len(good),
        errors=dict(Counter(r.code for r in records if r.code != OK).most_common()),
        served=len(good) / elapsed,
        tokens=sum(r.tokens for r in good) / elapsed,
        goodput=within / elapsed,
        within_slo=within,
        first_token=Percentiles.of([r.first - r.planned for r in good if r.first is not None]),
        inter_token=Percentiles.of([gap for r in good for gap in r.gaps]),
        end_to_end=end_to_end,
        lag=lag,
        generator_cpu=cpu,
        warnings=_warnings(lag, end_to_end, cpu, len(good)),
    )


def _meets(record: Record, slo: Slo) -> bool:
    on_time = record.done - record.planned <= slo.end_to_end
    return on_time and (record.first is None or record.first - record.planned <= slo.first_token)


def _warnings(lag: Percentiles | None, end_to_end: Percentiles | None, cpu: float, good: int) -> list[str]:
    warnings = []
    if lag and end_to_end and lag.p99 > max(0.002, 0.1 * end_to_end.p50):
        warnings.append(
            f"the generator was late by {1e3 * lag.p99:.1f} ms (p99): part of these latencies is its own, not the server's"
        )
    if cpu > 0.8:
        warnings.append(f"the generator used {100 * cpu:.0f} % of a core: it, not the server, may be the bottleneck")
    if 0 < good < 100:
        warnings.append(f"only {good} requests succeeded: their p99 is little more than the slowest one")
    return warnings
