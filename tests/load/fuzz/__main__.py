"""``python -m tests.load.fuzz``: what strangers may send, on this machine alone, bounded in number and time.

Three kinds, counted apart: mutated requests as calls over gRPC, abused HTTP/2 connections, and mutated requests to the methods
of the service without gRPC around them. Each has a number, and the same seed and number make the same again.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tests import tiny
from tests.load.fuzz.attack import Report, attack
from tests.load.fuzz.calls import request_of
from tests.load.fuzz.in_process import through_the_service
from tests.load.running import server_process
from tests.load.verdict import conclude
from tests.load.watched_server import COUNTED

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_AS_IN_THE_IMAGE = {"MALLOC_ARENA_MAX": "2"}
_MOST_RESIDENT_GROWTH = 256 * 2**20
"""Of the front end, when malloc has given back what it can."""


@app.command()
def main(
    calls: Annotated[int, typer.Option(min=0, help="Mutated requests over gRPC.")] = 1_000_000,
    abuses: Annotated[int, typer.Option(min=0, help="Abuses of connections.")] = 5_000,
    in_process: Annotated[int, typer.Option(min=0, help="Mutated requests to the service without gRPC.")] = 1_000_000,
    first: Annotated[int, typer.Option(min=0, help="Number of the first of each: to make one again, with a count of 1.")] = 0,
    bundles: Annotated[
        Path | None,
        typer.Option(help="Where the three tiny bundles are kept from one run to the next; made if there are none."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="The attack over connections ends then, done or not.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Fixes every request.")] = 1,
) -> None:
    """Starts a server of its own with a tiny model of each family, and exits with 1 unless nothing went wrong."""
    if calls == 1:
        print(f"request {first}: {request_of(seed, first)}")

    def say(report: Report) -> None:
        print(f"{report.seconds:7.0f} s {report.calls.total():9} calls: {dict(report.calls)}", flush=True)

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every write to a connection that the server has ended

    async def over_connections(folder: Path) -> Report:
        served = [folder / family for family in tiny.SHAPES]
        for bundle in served:
            if not bundle.exists():
                tiny.write_bundle(bundle, bundle.name)
        flags = ("--device", "cpu", "--engines", "1", "--threads", "1")
        async with server_process(
            *served, *flags, module="tests.load.watched_server", environment=_AS_IN_THE_IMAGE | COUNTED
        ) as server:
            return await attack(
                server, seed, calls=range(first, first + calls), abuses=range(first, first + abuses), minutes=minutes, say=say
            )

    facts, problems = list[str](), list[str]()
    if calls or abuses:
        with tempfile.TemporaryDirectory() as folder:
            report = asyncio.run(over_connections(bundles or Path(folder)))
        facts += [
            f"{report.calls.total()} mutated requests over gRPC ended {dict(report.calls)}",
            f"{report.connections.total()} connections were abused with {report.frames} frames, calls begun: {report.begun}:"
            f" {dict(report.connections)}",
            f"on them the server answered (by number of status) {dict(report.statuses)}: {dict(report.words)}",
            f"resident every 500 abuses: {[round(one / 2**20) for one in report.memory]} MiB; in use are"
            f" {report.growth / 2**20:.1f} MiB more than before, and may be {report.growth_allowed / 2**20:.1f}",
            f"in {report.seconds:.0f} s the canary sang {report.songs} times ({report.refused} calls refused)",
            f"before: {report.before}, after: {report.after},"
            f" resident once malloc has given back what it can: {report.given_back / 2**20:.0f} MiB",
        ]
        problems += report.problems
        if report.growth > report.growth_allowed:
            problems.append(f"the front end has {report.growth / 2**20:.0f} MiB more in use")
        if report.resident_growth > _MOST_RESIDENT_GROWTH:
            problems.append(f"the front end keeps {report.resident_growth / 2**20:.0f} MiB more than it began with")
    if in_process:
        ends, wrong = asyncio.run(through_the_service(seed, range(first, first + in_process)))
        facts.append(f"{ends.total()} mutated requests without gRPC ended {dict(ends)}")
        problems += wrong
    conclude(facts, problems)


app(prog_name="python -m tests.load.fuzz")
