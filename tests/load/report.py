"""The stages of a run as a Markdown table, as JSON, and the circumstances without which no figure means anything."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .ledger import Percentiles, Slo, Summary

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a reader needs to repeat the run."""

    command: str
    machine: str
    model: str
    stream: bool
    slo: Slo
    seconds: float
    """Length of every stage's schedule."""
    seed: int
    capacity: float | None
    """Requests a second in the closed-loop probe; None when the rates were given."""


def describe_machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {platform.system()}, Python {platform.python_version()}"


def markdown(circumstances: Circumstances, stages: Sequence[Summary]) -> str:
    """The whole report; every latency in milliseconds as p50 / p90 / p99."""
    about, slo = circumstances, circumstances.slo
    lines = [
        f"Model: {about.model}  ",
        f"Machine: {about.machine}; the generator runs on it too  ",
        f"Command: `{about.command}`  ",
        f"Method: Poisson arrivals (seed {about.seed}), {about.seconds:g} s a rate, open loop, "
        f"{'streaming' if about.stream else 'unary'} calls, latency from the planned send time  ",
        f"Goodput: first token within {1e3 * slo.first_token:g} ms and the whole answer within {1e3 * slo.end_to_end:g} ms",
    ]
    if about.capacity is not None:
        lines[-1] += "  "
        lines.append(f"Capacity in the closed-loop probe: {about.capacity:,.0f} requests/s")
    lines += ["", *_table(stages), "", best_rate(stages, slo)]
    warnings = [f"- at {stage.offered:g}/s {warning}" for stage in stages for warning in stage.warnings]
    if warnings:
        lines += ["", "Warnings:", "", *warnings]
    return "\n".join(lines) + "\n"


def best_rate(stages: Sequence[Summary], slo: Slo) -> str:
    """The headline: how much this server can be offered before its users notice."""
    passing = [stage.offered for stage in stages if stage.requests and stage.within_slo >= 0.99 * stage.requests]
    if not passing:
        return "At no offered rate did 99 % of the requests meet both bounds."
    return f"Highest offered rate at which 99 % of the requests met both bounds: **{max(passing):g} requests/s**."


def as_json(circumstances: Circumstances, stages: Sequence[Summary]) -> str:
    """Times in seconds, rates per second."""
    content = {"format_version": FORMAT_VERSION, **asdict(circumstances), "stages": [asdict(stage) for stage in stages]}
    return json.dumps(content, indent=2) + "\n"


def _table(stages: Sequence[Summary]) -> list[str]:
    header = [
        "offered/s",
        "served/s",
        "goodput/s",
        "tokens/s",
        "first token, ms",
        "between tokens, ms",
        "end to end, ms",
        "errors",
        "sent late p99, ms",
        "generator CPU",
    ]
    rows = [
        [
            f"{stage.offered:g}",
            f"{stage.served:,.1f}",
            f"{stage.goodput:,.1f}",
            f"{stage.tokens:,.0f}",
            _milliseconds(stage.first_token),
            _milliseconds(stage.inter_token),
            _milliseconds(stage.end_to_end),
            ", ".join(f"{count} {code}" for code, count in stage.errors.items()) or "0",
            _number(1e3 * stage.lag.p99) if stage.lag else "–",
            f"{100 * stage.generator_cpu:.0f} %",
        ]
        for stage in stages
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, rule, *rows]
    ]


def _milliseconds(values: Percentiles | None) -> str:
    if values is None:
        return "–"
    return " / ".join(_number(1e3 * value) for value in (values.p50, values.p90, values.p99))


def _number(value: float) -> str:
    """Three figures are more than a run of some seconds can vouch for."""
    decimals = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:,.{decimals}f}"
