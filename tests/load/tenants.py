"""``python -m tests.load.tenants BUNDLE``: what one tenant that asks for 20 times its share does to the others.

Four tenants of equal weight, so each has a quarter of the capacity. Three of them offer some of their share, in open loop,
first alone and then beside a fourth that offers 20 times its own; what counts is how much longer the three wait for their
answers. Both are done in turn, several times, for the machine is not the same from one minute to the next.
"""

from __future__ import annotations

import asyncio
import statistics
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

MODEST, GREEDY = ("a", "b", "c"), "greedy"
_MOST_LONGER = 1.25
_LEAST_ANSWERED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What the modest tenants got in one stage."""

    answered: float
    """Of their calls."""
    seconds: Percentiles
    """From the planned time of a call to its answer."""

    @classmethod
    def of(cls, records: Sequence[Record]) -> Share:
        good = [record.done - record.planned for record in records if record.code == OK]
        seconds = Percentiles.of(good)
        assert seconds is not None
        return cls(answered=len(good) / len(records), seconds=seconds)


def problems_of(alone: Sequence[Share], beside: Sequence[Share]) -> list[str]:
    """What is not as it must be, by the medians over the rounds."""
    longer = ratio(alone, beside)
    answered = statistics.median(share.answered for share in beside)
    found = []
    if longer > _MOST_LONGER:
        found.append(f"the others' p99 is {longer:.2f} times what it is without the greedy tenant")
    if answered < _LEAST_ANSWERED:
        found.append(f"the others got {answered:.1%} of their calls answered")
    return found


def ratio(alone: Sequence[Share], beside: Sequence[Share]) -> float:
    """Of the p99 beside the greedy tenant to that without it, each the median over the rounds."""
    return statistics.median(s.seconds.p99 for s in beside) / statistics.median(s.seconds.p99 for s in alone)


async def modest_and_greedy(base: Plan, capacity: float, load: float, excess: float) -> tuple[Share, Share | None]:
    """One stage; what the modest tenants got, and what the greedy one got if it was there.

    Args:
        load: of its share that each modest tenant offers.
        excess: times its share that the greedy one offers; 0: it stays away.
    """
    share = capacity / (len(MODEST) + 1)

    def plan(tenant: str, rate: float, seed: int) -> Plan:
        return replace(base, schedule=arrivals.poisson(rate, base.seconds, seed), seed=seed, tenant=tenant)

    plans = [plan(name, load * share, base.seed + number) for number, name in enumerate(MODEST)]
    if excess:
        plans.append(plan(GREEDY, excess * share, base.seed + len(MODEST)))
    outcomes = await asyncio.gather(*(asyncio.to_thread(run_stage, plan) for plan in plans))
    modest = [record for outcome in outcomes[: len(MODEST)] for record in outcome.records]
    return Share.of(modest), Share.of(outcomes[-1].records) if excess else None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: PerhapsBundle = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a bundle: one made for the purpose, tiny or base.")] = None,
    load: Annotated[float, typer.Option(min=0.05, max=1, help="Of its share that each modest tenant offers.")] = 0.8,
    excess: Annotated[float, typer.Option(min=1, help="Times its share that the greedy tenant offers.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Length of each stage; there are two in a round.")] = 8.0,
    deadline: Annotated[float, typer.Option(min=0.05, help="Seconds that each call allows.")] = 2.0,
    max_rows: Annotated[int | None, typer.Option(min=1, help="That the greedy tenant may hold. Default: all of them.")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="Default: the model's own.")] = None,
    inputs_file: Annotated[Path | None, typer.Option("--inputs", help="One text a line. Default: dates, made by code.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes the arrivals.")] = 1,
) -> None:
    """Starts a server of its own, and exits with 1 unless the others were served as if alone."""
    served, texts = subject(bundle, shape, inputs_file, seed)
    bounded = GREEDY if max_rows is None else f"{GREEDY}::{max_rows}"
    tenants = [option for name in (*MODEST, bounded) for option in ("--tenant", name)]

    async def run() -> tuple[list[Share], list[Share]]:
        async with server_process(served, "--device", "cpu", *tenants) as server:
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
            print(f"capacity: {capacity:.0f} calls/s; each of four tenants has a share of {capacity / 4:.0f}", flush=True)
            alone, beside = [], []
            for _ in range(rounds):
                alone.append((await modest_and_greedy(base, capacity, load, 0.0))[0])
                own, greedy = await modest_and_greedy(base, capacity, load, excess)
                beside.append(own)
                print(line("without it", alone[-1]), line("beside it", own), line("greedy", greedy), sep="; ", flush=True)
            return alone, beside

    alone, beside = asyncio.run(run())
    fact = f"the others' p99 beside the greedy tenant: {ratio(alone, beside):.2f} of what it is without it"
    conclude([fact], problems_of(alone, beside))


def line(name: str, share: Share | None) -> str:
    if share is None:
        return name
    p50, p99 = share.seconds.p50 * 1000, share.seconds.p99 * 1000
    return f"{name}: {share.answered:.1%} answered, p50 / p99 {p50:.0f} / {p99:.0f} ms"


if __name__ == "__main__":
    app(prog_name="python -m tests.load.tenants")
