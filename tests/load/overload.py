"""``python -m tests.load.overload BUNDLE``: what a server makes of 1 to 10 times the load that it can carry.

It finds the capacity, then offers multiples of it in open loop, each call with a deadline. Good is what was answered within it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from tests.load import arrivals
from tests.load.ledger import OK, Percentiles, Record
from tests.load.plan import Plan
from tests.load.running import server_process
from tests.load.stage import run_stage
from tests.load.subject import PerhapsBundle, subject
from tests.load.sweep import probe_capacity
from tests.load.verdict import conclude

REFUSED = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED")
"""CANCELLED is how gRPC's core ends what a server is too busy to look at (``TransportLimits.grpc_options``)."""
_LATE_SHARE = 0.9
"""Of its deadline: a call that the server ends after that was taken and came too late, whatever its status."""
_LATE_REFUSAL = 0.020
_EXPIRED_SHARE = 0.001
_GOODPUT_SHARE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One multiple of the capacity."""

    factor: float
    offered: float
    """Calls a second."""
    good: float
    """Answered within their deadlines, a second."""
    refused: int
    unseen: int
    """Of these, ended without a reason."""
    refusal: Percentiles | None
    """Seconds from sending a call to its refusal."""
    answered: Percentiles | None
    """Seconds from a call's planned time to its answer."""
    expired: int
    """Calls that were taken and not answered in time."""
    accepted: int
    others: int
    """Calls that ended in any other way."""
    lag: float
    """How late the generator itself was at its worst percentile, in seconds."""


def measure(factor: float, rate: float, plan: Plan, records: Sequence[Record]) -> Stage:
    good = [record for record in records if record.code == OK]
    ended = [record for record in records if record.code in REFUSED]
    refused = [record.done - record.sent for record in ended if record.done - record.sent < _LATE_SHARE * plan.deadline]
    expired = sum(record.code == "DEADLINE_EXCEEDED" for record in records) + len(ended) - len(refused)
    lag = Percentiles.of([record.sent - record.planned for record in records])
    return Stage(
        factor=factor,
        offered=rate,
        good=len(good) / max(plan.seconds, *(record.done for record in records)),
        refused=len(refused),
        unseen=sum(record.code == "CANCELLED" for record in ended),
        refusal=Percentiles.of(refused),
        answered=Percentiles.of([record.done - record.planned for record in good]),
        expired=expired,
        accepted=len(good) + expired,
        others=len(records) - len(good) - len(refused) - expired,
        lag=lag.p99 if lag else 0.0,
    )


def problems_of(stages: Sequence[Stage]) -> list[str]:
    """What is not as it must be."""
    best = max(stage.good for stage in stages)
    found = []
    for stage in stages:
        name = f"{stage.factor:g} x"
        if stage.good < _GOODPUT_SHARE * best and stage.factor >= 1.5:
            found.append(f"{name}: goodput is {stage.good / best:.1%} of its peak")
        if stage.refusal and stage.refusal.p99 > _LATE_REFUSAL:
            found.append(f"{name}: one refusal in a hundred took longer than {stage.refusal.p99 * 1000:.1f} ms")
        if stage.expired > _EXPIRED_SHARE * stage.accepted:
            found.append(f"{name}: {stage.expired} of {stage.accepted} accepted calls came too late")
        if stage.others:
            found.append(f"{name}: {stage.others} calls ended with another status")
    return found


def table(stages: Sequence[Stage]) -> str:
    """Markdown; times in milliseconds."""

    def milliseconds(figures: Percentiles | None) -> str:
        return f"{figures.p50 * 1000:.1f} / {figures.p99 * 1000:.1f}" if figures else "–"

    lines = [
        "| load | offered/s | good/s | answer p50 / p99, ms | refused (without a reason) | refusal p50 / p99, ms | too late"
        " | sent late, p99 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {stage.factor:g} x | {stage.offered:.0f} | {stage.good:.0f} | {milliseconds(stage.answered)} | {stage.refused}"
        f" ({stage.unseen})"
        f" | {milliseconds(stage.refusal)} | {stage.expired} of {stage.accepted} | {stage.lag * 1000:.1f} ms |"
        for stage in stages
    ]
    return "\n".join(lines)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: PerhapsBundle = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a bundle: one made for the purpose, tiny or base.")] = None,
    factor: Annotated[list[float] | None, typer.Option(help="Multiples of the capacity; default: 1, 1.5, 2, 4, 10.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Length of each stage.")] = 10.0,
    deadline: Annotated[float, typer.Option(min=0.05, help="Seconds that each call allows.")] = 1.0,
    beams: Annotated[int | None, typer.Option(min=1, help="Default: the model's own.")] = None,
    inputs_file: Annotated[Path | None, typer.Option("--inputs", help="One text a line. Default: dates, made by code.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the arrivals.")] = 1,
) -> None:
    """Starts a server of its own, and exits with 1 unless every promise was kept."""
    served, texts = subject(bundle, shape, inputs_file, seed)

    async def run() -> list[Stage]:
        async with server_process(served, "--device", "cpu") as server:
            base = Plan(
                target=server.target,
                texts=texts,
                seed=seed,
                schedule=[],
                seconds=seconds,
                stream=False,
                beams=beams,
                deadline=deadline,
            )
            capacity = await asyncio.to_thread(probe_capacity, base, run_stage)
            print(f"capacity: {capacity:.0f} calls/s", flush=True)
            stages = []
            for multiple in factor or (1.0, 1.5, 2.0, 4.0, 10.0):
                plan = replace(base, schedule=arrivals.poisson(multiple * capacity, seconds, seed))
                outcome = await asyncio.to_thread(run_stage, plan)
                stages.append(measure(multiple, multiple * capacity, plan, outcome.records))
            return stages

    stages = asyncio.run(run())
    conclude([table(stages)], problems_of(stages))


if __name__ == "__main__":
    app(prog_name="python -m tests.load.overload")
