"""``python -m tests.simulation``: as many lives as asked for; the first that goes wrong is named by its seed, to replay it."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from typing import Annotated

import typer

from tests.simulation.world import ends_of

_AT_ONCE = 50
"""Lives that a process is given at a time."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many lives.")] = 100_000,
    first: Annotated[int, typer.Option(help="The first seed; with --seeds 1, the life that is lived again.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="That share the lives out.")] = 1,
) -> None:
    """Exits with 1 at the first life in which something did not hold."""
    ends: Counter[str] = Counter()
    began = time.monotonic()
    chunks = [range(at, min(at + _AT_ONCE, first + seeds)) for at in range(first, first + seeds, _AT_ONCE)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, some in enumerate(pool.imap_unordered(ends_of, chunks), start=1):
            ends.update(some)
            if number * _AT_ONCE % 10_000 == 0:
                print(f"{number * _AT_ONCE:9} lives, {time.monotonic() - began:6.0f} s", flush=True)
    print(f"{seeds} lives in {time.monotonic() - began:.0f} s, {ends.total()} calls: {dict(ends)}; everything held")


if __name__ == "__main__":
    app(prog_name="python -m tests.simulation")
