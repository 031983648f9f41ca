"""``python -m tests.simulation``: as many lives as asked for; the first that goes wrong is named by its seed, to replay it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Annotated

import typer

from tests.simulation.world import live

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many lives.")] = 10_000,
    first: Annotated[int, typer.Option(help="The first seed.")] = 0,
) -> None:
    ends: Counter[str] = Counter()
    began = time.monotonic()
    for seed in range(first, first + seeds):
        ends.update(live(seed).ends)
    print(f"{seeds} lives in {time.monotonic() - began:.0f} s, {ends.total()} calls: {dict(ends)}; everything held")


app(prog_name="python -m tests.simulation")
