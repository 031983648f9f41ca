"""``python -m tests.bench.growth``: what a decode step costs as rows and texts grow, in time and in memory.

Two sweeps over rows that may hold 1,024 positions: more and more rows, each ``LENGTH`` tokens into its text, and ``ROWS`` rows
further and further into theirs. Caches hold random numbers, so that no page is shared or known to be zero.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from export.bundle import CACHE_TYPES
from server.batch.sequence_model import SequenceShape
from server.device.caches import CacheLayout
from server.device.host_caches import HostCaches
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from tests.bench.natural import natural_model, source_of
from tests.bench.shapes import LENGTHS, SHAPES, graphs, machine

CAPACITY = 1024
ROWS, LENGTH = 16, 64
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one decode step."""

    rows: int
    length: int
    seconds: float
    """Median."""
    caches: int
    """Bytes of caches if so many rows were as long as they may be."""
    least: int
    """Bytes if no text could be longer."""
    resident: int
    """Bytes by which the process has grown since no row was in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    model: str
    """Shape and precision."""
    over: str
    """What grows: "rows" or "length"."""
    costs: list[Cost]


class Bench:
    """One runtime with room for every point of a sweep."""

    def __init__(self, shape: str, precision: str, rows: int, settings: SessionSettings) -> None:
        config = replace(SHAPES[shape], max_target_length=CAPACITY)
        self.shape = SequenceShape.from_config(config.to_dict())
        folder = graphs(shape, natural_model(config), precision)
        self.cache_type = CACHE_TYPES[precision]
        self.caches = HostCaches(CacheLayout.of(self.shape, rows, self.cache_type))
        self.runtime = SequenceRuntime(folder, self.shape, rows, settings, self.caches)
        self.source_length = LENGTHS[shape][0]
        self.runtime.decode(np.full(1, 4), np.zeros(1, np.int64), 1)  # what the session itself needs is not the caches'
        self.at_start = _resident()

    def cost(self, rows: int, length: int, seconds: float) -> Cost:
        self._fill(rows, length)
        tokens, positions = np.full(rows, 4), np.full(rows, length - 1)
        for _ in range(3):
            self.runtime.decode(tokens, positions, 1)
        times, end = list[float](), time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            started = time.perf_counter()
            self.runtime.decode(tokens, positions, 1)
            times.append(time.perf_counter() - started)
        caches, least = (
            sum(CacheLayout.of(replace(self.shape, longest_target=longest), rows, self.cache_type).sizes)
            for longest in (CAPACITY, length)
        )
        middle, resident = statistics.median(times), _resident() - self.at_start
        return Cost(rows=rows, length=length, seconds=middle, caches=caches, least=least, resident=resident)

    def _fill(self, rows: int, length: int) -> None:
        """Sources are encoded; what the rows have written so far is made up."""
        rng = random.Random(0)
        for begin in range(0, rows, 32):
            some = range(begin, min(begin + 32, rows))
            sources = [source_of(rng, self.source_length, self.shape.vocab_size) for _ in some]
            self.runtime.encode(sources, [np.array([row]) for row in some])
        self.runtime.decode(np.full(rows, 4), np.full(rows, length - 1), 1)  # lays the caches out for this length
        noise = np.random.default_rng(0).normal(size=(length, self.shape.head_width))
        for bound in self.caches.views(slice(0, rows)):
            if bound.name.startswith("self"):
                memory = (ctypes.c_uint8 * (bound.dtype.itemsize * math.prod(bound.shape))).from_address(bound.pointer)
                values = np.ctypeslib.as_array(memory).view(bound.dtype).reshape(bound.shape)  # [B, G, C, K]
                values[:, :, :length] = noise if bound.dtype.kind == "f" else 30 * noise


def measure(
    shape: str, precision: str, points: Sequence[tuple[int, int]], seconds: float, settings: SessionSettings
) -> list[Cost]:
    """One sweep over points (rows, length)."""
    bench = Bench(shape, precision, max(rows for rows, _ in points), settings)
    return [bench.cost(rows, length, seconds) for rows, length in points]


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show(console: Console, sweep: Sweep) -> None:
    table = Table(
        "rows",
        "length",
        "ms a step",
        "tokens/s",
        "caches MiB",
        "least MiB",
        "resident MiB",
        title=f"{sweep.model}: {sweep.over}",
    )
    for cost in sweep.costs:
        memory = [f"{size / MIB:,.1f}" for size in (cost.caches, cost.least, cost.resident)]
        table.add_row(
            str(cost.rows), str(cost.length), f"{1e3 * cost.seconds:.3f}", f"{cost.rows / cost.seconds:,.0f}", *memory
        )
    console.print(table)


def draw(sweeps: Sequence[Sweep], path: Path) -> None:
    """Time and memory against rows and against length, on logarithmic axes."""
    from matplotlib import pyplot

    from tests.load.plot import STYLE

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), sharex="col", layout="constrained")
        for sweep in sweeps:
            column = ("rows", "length").index(sweep.over)
            x = [getattr(cost, sweep.over) for cost in sweep.costs]
            axes[0][column].loglog(x, [1e3 * cost.seconds for cost in sweep.costs], marker="o", label=sweep.model)
            axes[1][column].loglog(x, [cost.resident / MIB for cost in sweep.costs], marker="o", label=sweep.model)
            axes[1][column].set_xlabel(sweep.over)
        axes[0][0].set_ylabel("ms a step")
        axes[1][0].set_ylabel("memory of the process beside the model, MiB")
        axes[0][0].legend()
        axes[0][0].set_title(f"{LENGTH} tokens long", fontsize=9, loc="left")
        axes[0][1].set_title(f"{ROWS} rows", fontsize=9, loc="left")
        figure.suptitle(f"One decode step on {machine()}", fontsize=10, x=0.012, ha="left")
        figure.savefig(path)


def main(
    shapes: Annotated[list[str], typer.Option("--shape", help="base or tiny; may be given twice.")] = ["tiny", "base"],  # noqa: B006
    precisions: Annotated[list[str], typer.Option("--precision", help="fp32 or int8.")] = ["fp32"],  # noqa: B006
    rows: Annotated[list[int], typer.Option(help="Rows to try.")] = [1, 2, 4, 8, 16, 32, 64, 128, 256],  # noqa: B006
    lengths: Annotated[list[int], typer.Option("--length", help="Lengths to try.")] = [16, 32, 64, 128, 256, 512, 1024],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="Time for each point.")] = 0.5,
    threads: Annotated[int, typer.Option(help="Threads of the session; 0: all cores.")] = 0,
    spinning: Annotated[bool, typer.Option(help="Let idle threads of the session spin.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them here too.")] = None,
) -> None:
    console, sweeps, settings = Console(), list[Sweep](), SessionSettings(threads=threads, spinning=spinning)
    console.print(machine())
    for shape, precision in itertools.product(shapes, precisions):
        for over, points in (("length", [(ROWS, n) for n in lengths]), ("rows", [(n, LENGTH) for n in rows])):
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # so that memory is the sweep's own
                costs = fresh.submit(measure, shape, precision, points, seconds, settings).result()
            sweeps.append(Sweep(model=f"{shape} {precision}", over=over, costs=costs))
            show(console, sweeps[-1])
    if json_file:
        report = {"machine": machine(), "sweeps": [asdict(sweep) for sweep in sweeps]}
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if png:
        draw(sweeps, png)


if __name__ == "__main__":
    typer.run(main)
