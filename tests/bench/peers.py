"""``python -m tests.bench.peers``: tokens/s of our engine beside CTranslate2, on the same weights, in one run.

Encoding is included, all cores may be used, and each side runs in its best configuration for the point, found by trying all its
candidates. Then the sides take turns, and medians are compared. So many clients send requests, each its next one when its last
one is answered; how a side batches them is its own affair. ``fixed`` lengths: all sources of a shape are equally long, and so
are all texts. ``natural``: each text is as long as its source, 5 to 40 tokens, on both sides alike.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from model.transformer import Transformer
from tests.bench.contender import Contender, ContenderFailed, Job, Outcome, Settings, Side
from tests.bench.points import Lengths, Point, Precision, Shape, Strategy
from tests.bench.shapes import BUILD, build_model, graphs, machine
from tests.bench.sides import CTranslate2Side, EngineSide

HOPELESS = 3.0
"""A candidate that many times slower than the best in its first run is not tried again."""
CLOSE = 1.25
"""Nor is one that many times slower in a run of the sweep."""
COLD = 1.0
"""Seconds of a first run beside which it does not tell that nothing was in place yet."""
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one side made of a point."""

    runs: list[Outcome]
    config: Settings

    @property
    def rate(self) -> float:
        """Tokens/s, the median of all runs."""
        return statistics.median(run.rate for run in self.runs)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running side with one of its tunings."""

    contender: Contender
    tuning: dict[str, int]

    def run(self, job: Job) -> Outcome:
        return self.contender.run(replace(job, tuning=self.tuning))

    def run_warm(self, job: Job) -> Outcome:
        """A run behind another one, unless it is long."""
        first = self.run(job)
        return self.run(job) if first.seconds < COLD else first


def engine_sides(shape: Shape, model: Transformer, precision: Precision, rows: int) -> list[Side]:
    """Everything of ours that is worth trying."""
    folder = graphs(shape, model, precision).absolute()
    return [
        EngineSide(graphs=folder, config=model.config, rows=rows, processes=count, threads=threads, spinning=threads > 1)
        for count, threads in sorted({(1, 1), (1, CORES), (CORES, 1)})
    ]


def peer_sides(shape: Shape, model: Transformer, precision: Precision) -> list[Side]:
    """Everything of CTranslate2 that is worth trying: from one worker with all cores to a worker for each."""
    from tests.bench.ctranslate2_peer import convert  # which nothing else here needs to be installed for

    folder = convert(model, (BUILD / "ctranslate2" / shape / precision).absolute(), precision)
    return [
        CTranslate2Side(folder=folder, workers=workers, threads=CORES // workers, mkl=mkl)
        for workers in range(1, CORES + 1)
        if CORES % workers == 0
        for mkl in (False, True)
    ]


def promising(contenders: Sequence[Contender], job: Job, concurrency: int) -> list[tuple[Candidate, Outcome]]:
    """The candidates that are not out of the question after one warm run, and what that brought."""
    candidates = [Candidate(contender, tuning) for contender in contenders for tuning in contender.side.tunings(concurrency)]
    first = [candidate.run_warm(job) for candidate in candidates]
    best = max(run.rate for run in first)
    return [(candidate, run) for candidate, run in zip(candidates, first, strict=True) if run.rate > best / HOPELESS]


def sweep(field: Sequence[tuple[Candidate, Outcome]], job: Job) -> Candidate:
    """The fastest candidate. Those that came close to the best run once more, and the better run counts.

    Args:
        field: the candidates, and what each made of ``job`` so far.
    """
    best = max(run.rate for _, run in field)
    close = [(candidate, run.rate) for candidate, run in field if run.rate > best / CLOSE]
    if len(close) == 1:
        return close[0][0]
    return max(close, key=lambda pair: max(pair[1], pair[0].run(job).rate))[0]


def compare(point: Point, sides: Sequence[Sequence[Contender]], seconds: float, repeat: int) -> list[Measured]:
    """Sweeps each side, then lets the best candidates take turns, about ``seconds`` each time."""
    fields = [promising(side, point.job(1), point.concurrency) for side in sides]
    least = min(run.seconds for field in fields for _, run in field)
    # Of texts as long as they want, a single round shows how the last ones end, which no others follow.
    natural = point.lengths is Lengths.NATURAL
    rounds = max(2 if natural else 1, round(0.25 * seconds / least))
    short, whole = point.job(rounds), point.job(max(3 if natural else 1, round(seconds / least)))
    if rounds > 1:
        fields = [[(candidate, candidate.run(short)) for candidate, _ in field] for field in fields]
    chosen = [sweep(field, short) for field in fields]
    turns = [[candidate.run(whole) for candidate in chosen] for _ in range(repeat)]
    return [
        Measured(runs=list(runs), config=candidate.contender.side.settings | candidate.tuning)
        for candidate, runs in zip(chosen, zip(*turns, strict=True), strict=True)
    ]


def record(point: Point, measured: Sequence[Measured], missing: str) -> dict[str, object]:
    """One point of the JSON report; ours may be missing."""
    *ours, peer = measured
    facts: dict[str, object] = asdict(point) | {"ours": None, "peer": peer.rate, "ratio": None, "peer_config": peer.config}
    facts["peer_runs"] = [asdict(run) for run in peer.runs]
    if not ours:
        return facts | {"missing": missing}
    (own,) = ours
    if any(a.tokens != b.tokens for a, b in zip(own.runs, peer.runs, strict=True)):
        facts["note"] = "the sides wrote texts of different lengths"
    runs = [asdict(run) for run in own.runs]
    return facts | {"ours": own.rate, "ratio": own.rate / peer.rate, "ours_config": own.config, "ours_runs": runs}


def start(stack: ExitStack, sides: Sequence[Side]) -> list[Contender]:
    return [stack.enter_context(Contender(side)) for side in sides]


def _names(side: Side) -> str:
    return "/".join([*side.settings, *next(iter(side.tunings(1)))])


def _values(config: object) -> str:
    return "/".join(str(int(value)) for value in config.values()) if isinstance(config, dict) else ""


def main(
    shapes: Annotated[list[Shape], typer.Option("--shape")] = list(Shape),  # noqa: B006
    precisions: Annotated[list[Precision], typer.Option("--precision")] = list(Precision),  # noqa: B006
    strategies: Annotated[list[Strategy], typer.Option("--strategy")] = list(Strategy),  # noqa: B006
    concurrencies: Annotated[list[int], typer.Option("--concurrency", help="Clients.")] = [1, 8, 32, 64, 128],  # noqa: B006
    lengths: Annotated[list[Lengths], typer.Option("--lengths")] = list(Lengths),  # noqa: B006
    repeat: Annotated[int, typer.Option(help="Runs of each side, taken in turn.")] = 5,
    seconds: Annotated[float, typer.Option(help="Length of one run, about.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything here too, after each point.")] = None,
) -> None:
    console = Console()
    versions = {package: version(package) for package in ("onnxruntime", "ctranslate2", "torch")}
    report: dict[str, object] = {"machine": machine(), "versions": versions, "points": (points := list[dict[str, object]]())}
    console.print(f"{report['machine']}; {', '.join(map(' '.join, versions.items()))}; tokens/s, medians of {repeat}")
    for shape, precision in itertools.product(shapes, precisions):
        model, missing = build_model(shape), ""
        with ExitStack() as stack:
            sides = [start(stack, peer_sides(shape, model, precision))]
            clients = max(CORES, *concurrencies)  # where each core has an engine, each has room for one beam search
            rows = clients * max(strategy.beams for strategy in strategies)
            try:
                sides.insert(0, start(stack, engine_sides(shape, model, precision, rows)))
            except (ContenderFailed, KeyError, TypeError, RuntimeError) as error:
                missing = str(error)
            table = Table("strategy", "lengths", "clients", "ours", "peer", "ratio", title=f"{shape} {precision}")
            for contenders in sides:
                table.add_column(_names(contenders[0].side))
            for strategy, kind, concurrency in itertools.product(strategies, lengths, concurrencies):
                point = Point(shape=shape, precision=precision, strategy=strategy, concurrency=concurrency, lengths=kind)
                facts = record(point, compare(point, sides, seconds, repeat), missing)
                points.append(facts)
                row = [strategy, kind, concurrency, *(facts[name] for name in ("ours", "peer", "ratio"))]
                configs = [facts[name] for name in ("ours_config", "peer_config") if name in facts]
                table.add_row(*map(_cell, row), *map(_values, configs))
                console.print(*map(_cell, row), *map(_values, configs), facts.get("note", ""))
                if json_file:
                    json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(table)
        if missing:
            console.print(f"ours is missing: {missing}")


def _cell(value: object) -> str:
    return (
        f"{value:.2f}"
        if isinstance(value, float) and value < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    typer.run(main)
