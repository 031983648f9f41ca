"""``python -m tests.bench.compare_bundles RUN BUNDLE...``: bundles of one run beside each other, as they are served.

Every held-out source is sent to a server of each bundle, many calls at a time, the bundles in turn, again and again:
sentences/s with the client on the same cores, and the task's metric. For what an export option costs and gives.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from model import metrics
from model.checkpoint import load_run
from server.client import Generation, TransformerClient
from tests.bench.parity import translate
from tests.bench.served import served
from tests.bench.shapes import machine

WARM_UP = 100
"""Sentences before those that count."""


async def answer(
    target: str, sources: list[str], beams: int, max_tokens: int, concurrency: int
) -> tuple[list[Generation], float]:
    """What the server makes of the sources, and the seconds that it takes once it is warm."""
    async with TransformerClient(target, timeout=120) as client:
        await translate(client, sources[:WARM_UP], beams, max_tokens, concurrency)
        started = time.perf_counter()
        found = await translate(client, sources, beams, max_tokens, concurrency)
        return found, time.perf_counter() - started


def main(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")],
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...")],
    beams: Annotated[list[int], typer.Option(help="Beam widths; 1 is greedy.")] = [1, 5],  # noqa: B006
    precision: Annotated[str, typer.Option(help="Which graphs the servers run.")] = "int8",
    concurrency: Annotated[int, typer.Option(help="Calls in flight.")] = 64,
    repeat: Annotated[int, typer.Option(help="Turns.")] = 3,
) -> None:
    console, run = Console(), load_run(run_folder)
    sources, targets = ([example[side] for example in run.held_out] for side in ("source", "target"))
    measure = metrics.TEXT_METRICS[run.task["metric"]]
    max_tokens = min(run.generation["max_tokens"], run.config.max_target_length)
    table = Table("decoding", "bundle", "sentences/s", run.task["metric"])
    for width in beams:
        rates, values = defaultdict[Path, list[float]](list), dict[Path, float]()
        for _ in range(repeat):
            for bundle in bundles:
                with served(bundle, "--precision", precision) as target:
                    found, seconds = asyncio.run(answer(target, sources, width, max_tokens, concurrency))
                rates[bundle].append(len(sources) / seconds)
                values[bundle] = measure([generation.text for generation in found], targets)
        for bundle in bundles:
            name = "greedy" if width == 1 else f"beam {width}"
            table.add_row(name, bundle.name, f"{statistics.median(rates[bundle]):.0f}", f"{values[bundle]:.2f}")
    console.print(f"{machine()}; {precision}; {len(sources)} sentences, {concurrency} calls in flight; medians of {repeat}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
