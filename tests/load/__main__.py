"""Measures a running server on this machine. See ``python -m tests.load --help``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import arrivals, inputs, report, sweep
from .ledger import Slo, Summary, summarise
from .plan import Plan, PlanError
from .stage import StageError, run_stage

MAX_STAGES = 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server; on this machine only.")] = "127.0.0.1:50051",
    model: Annotated[str, typer.Option(help="Model name; may be left out when the server has only one.")] = "",
    rate: Annotated[list[float] | None, typer.Option(min=0.01, help="Requests a second; repeat for several stages.")] = None,
    find_rates: Annotated[bool, typer.Option("--sweep", help="Find the capacity and offer fractions of it (default).")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, max=arrivals.MAX_SECONDS, help="Length of each stage.")] = 10.0,
    inputs_file: Annotated[Path | None, typer.Option("--inputs", help="One text a line. Default: dates, made by code.")] = None,
    stream: Annotated[bool, typer.Option(help="GenerateStream (gives first-token times) or Generate.")] = True,
    beams: Annotated[int | None, typer.Option(min=1, help="Default: the model's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the model's own.")] = None,
    deadline: Annotated[float, typer.Option(min=0.1, max=300, help="Seconds that one call may take.")] = 30.0,
    slo_first_token: Annotated[float, typer.Option(min=0.1, metavar="MS", help="Bound for goodput.")] = 200.0,
    slo_end_to_end: Annotated[float, typer.Option(min=0.1, metavar="MS", help="Bound for goodput.")] = 1000.0,
    connections: Annotated[int, typer.Option(min=1, max=64, help="HTTP/2 connections that the calls are spread over.")] = 4,
    seed: Annotated[int, typer.Option(help="Fixes the arrivals and the order of the inputs.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")] = None,
    png_file: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the curve here.")] = None,
) -> None:
    """Offers a running server Poisson traffic in open loop and reports latency from the planned send times.

    The Markdown report goes to standard output, progress to standard error. It stops by itself.
    """
    if rate and find_rates:
        fail("--rate and --sweep exclude each other")
    if rate and len(rate) > MAX_STAGES:
        fail(f"--rate may be given at most {MAX_STAGES} times")
    for file in (json_file, png_file):
        if file and not file.absolute().parent.is_dir():
            fail(f"{file}: no such directory")
    try:
        base = Plan(
            target=target,
            texts=inputs.read_lines(inputs_file) if inputs_file else inputs.dates(1000, seed),
            seed=seed,
            schedule=[],
            seconds=seconds,
            stream=stream,
            model=model,
            beams=beams,
            max_tokens=max_tokens,
            deadline=deadline,
            connections=connections,
        )
        if rate:
            capacity, rates = None, sorted(set(rate))
        else:
            note("finding the capacity in closed loop …")
            capacity = sweep.probe_capacity(base, run_stage)
            rates = sweep.rates_around(capacity)
            note(f"about {capacity:,.0f} requests/s; offering {', '.join(f'{r:g}' for r in rates)}")
        schedules = [arrivals.poisson(r, seconds, seed + index) for index, r in enumerate(rates)]
    except (PlanError, inputs.InputError, arrivals.ArrivalError, StageError) as error:
        fail(str(error))
    slo = Slo(first_token=slo_first_token / 1e3, end_to_end=slo_end_to_end / 1e3)
    answering = model or "unknown"
    stages: list[Summary] = []
    try:
        for summary, described in run_stages(base, rates, schedules, slo):
            stages.append(summary)
            answering = described
    except StageError as error:
        note(f"stopped: {error}")
    except KeyboardInterrupt:
        note("stopped by hand; what was measured so far:")
    if not stages:
        raise SystemExit(2)
    circumstances = report.Circumstances(
        command=shlex.join(["python", "-m", "tests.load", *sys.argv[1:]]),
        machine=report.describe_machine(),
        model=answering,
        stream=stream,
        slo=slo,
        seconds=seconds,
        seed=seed,
        capacity=capacity,
    )
    typer.echo(report.markdown(circumstances, stages))
    if json_file:
        json_file.write_text(report.as_json(circumstances, stages), encoding="utf-8")
    if png_file:
        from .plot import draw

        draw(circumstances, stages, png_file)
    if len(stages) < len(rates):
        raise SystemExit(2)


def run_stages(base: Plan, rates: list[float], schedules: list[list[float]], slo: Slo) -> Iterator[tuple[Summary, str]]:
    """Yields each stage's figures and the model that answered; a stage begins when the last answer of the one before is in."""
    for rate, schedule in zip(rates, schedules, strict=True):
        note(f"{rate:g} requests/s for {base.seconds:g} s ({len(schedule)} requests) …")
        outcome = run_stage(replace(base, schedule=schedule))
        yield (
            summarise(outcome.records, offered=rate, seconds=base.seconds, slo=slo, cpu_seconds=outcome.cpu_seconds),
            outcome.model,
        )


def note(text: str) -> None:
    typer.echo(text, err=True)


def fail(reason: str) -> NoReturn:
    note(f"error: {reason}")
    raise SystemExit(2)


if __name__ == "__main__":
    app(prog_name="python -m tests.load")
