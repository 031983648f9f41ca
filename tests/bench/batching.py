"""``python -m tests.bench.batching``: iteration-level batching beside the same engine batching statically, in one run.

Requests arrive as a Poisson process, each with a length of its own, at a share of the throughput that was measured first, with
everything present at once. Static batching lets requests join only when nobody is left in the batch, and then as many as there
are rows for; it still answers each request as soon as its own text ends. The loop is open: a latency begins when the request
was due, whatever the engine was doing.

The two have different capacities, so two loads are offered: a share of the lesser, which both can carry, and of the greater.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from model.decode import BOS, EOS
from server.batch.engine import Engine
from server.batch.scheduler import Scheduler, Waiting
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.requests import Decoding, Finished, GenerationRequest
from tests.bench.natural import natural_length, source_of
from tests.bench.shapes import SHAPES, build_model, graphs, machine
from tests.load.arrivals import poisson

MODES = ("static", "iteration")


class StaticScheduler(Scheduler):
    """Nobody joins before everybody has left."""

    def __init__(self, rows: int) -> None:
        super().__init__(join_tokens=2**31)
        self.rows = rows

    def schedule(self, free_rows: int, budget: int | None = None) -> list[Waiting]:
        return super().schedule(free_rows, budget) if free_rows == self.rows else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of one run; times in seconds."""

    mode: str
    offered: float
    """Requests/s; 0 when all were present at once."""
    served: float
    """Requests/s."""
    tokens: float
    """Tokens/s."""
    p50: float
    p99: float


def serve(mode: str, runtime: SequenceRuntime, requests: Sequence[GenerationRequest], due: Sequence[float]) -> Run:
    """Drives an engine until every request is answered; ``due`` rises."""
    engine = Engine(runtime, start_token=BOS, end_token=EOS)
    if mode == "static":
        engine.scheduler = StaticScheduler(runtime.rows)
    due_at = dict(zip((request.id for request in requests), due, strict=True))
    latencies, tokens, sent, started = list[float](), 0, 0, time.perf_counter()
    while len(latencies) < len(requests):
        now = time.perf_counter() - started
        while sent < len(requests) and due[sent] <= now:
            engine.submit(requests[sent])
            sent += 1
        if not engine.has_work:
            time.sleep(max(0.0, due[sent] - now))
            continue
        events, _ = engine.step()
        now = time.perf_counter() - started
        for request_id, event in events:
            if isinstance(event, Finished):
                latencies.append(now - due_at[request_id])
                tokens += len(event.hypotheses[0].tokens)
    p50, p99 = np.percentile(latencies, (50, 99)).tolist()
    offered = len(due) / due[-1] if due[-1] else 0.0
    return Run(mode=mode, offered=offered, served=len(due) / now, tokens=tokens / now, p50=p50, p99=p99)


def make_requests(count: int, vocab_size: int, beams: int, seed: int) -> list[GenerationRequest]:
    rng, decoding = random.Random(seed), Decoding(max_tokens=64, beams=beams)
    sources = [source_of(rng, natural_length(rng), vocab_size) for _ in range(count)]
    return [GenerationRequest(id=str(i), input_ids=tuple(source), decoding=decoding) for i, source in enumerate(sources)]


def median(runs: Sequence[Run]) -> Run:
    """Of each quantity by itself."""
    numbers = {
        name: statistics.median(getattr(run, name) for run in runs) for name in ("offered", "served", "tokens", "p50", "p99")
    }
    return Run(mode=runs[0].mode, **numbers)


def main(
    shape: Annotated[str, typer.Option(help="base or tiny.")] = "tiny",
    precision: Annotated[str, typer.Option(help="fp32 or int8.")] = "fp32",
    rows: Annotated[int, typer.Option(help="Row capacity of the running batch.")] = 64,
    beams: Annotated[int, typer.Option(help="Beam width; 1: greedy.")] = 1,
    load: Annotated[float, typer.Option(help="Share of the measured capacity that is offered.")] = 0.8,
    seconds: Annotated[float, typer.Option(help="Length of one run's arrivals.")] = 20.0,
    repeat: Annotated[int, typer.Option(help="Runs of each mode and load, taken in turn.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of the session; 0: all cores.")] = 0,
    spinning: Annotated[bool, typer.Option(help="Let idle threads of the session spin.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all runs here too.")] = None,
) -> None:
    console, config, model = Console(), SHAPES[shape], build_model(shape)
    settings = SessionSettings(threads=threads, spinning=spinning)
    runtime = SequenceRuntime(graphs(shape, model, precision), SequenceShape.from_config(config.to_dict()), rows, settings)
    runtime.tune()
    backlog = make_requests(8 * rows // beams, config.vocab_size, beams, seed=0)
    at_once = [0.0] * len(backlog)
    serve("iteration", runtime, backlog, at_once)  # warms up
    capacity = {mode: median([serve(mode, runtime, backlog, at_once) for _ in range(3)]) for mode in MODES}
    runs = list(capacity.values())
    table = Table(
        "batching", "offered/s", "served/s", "tokens/s", "p50 ms", "p99 ms", title=f"{shape} {precision}, {rows} rows"
    )
    for mode in MODES:
        table.add_row(mode, "all at once", f"{capacity[mode].served:,.0f}", f"{capacity[mode].tokens:,.0f}", "", "")
    for rate in sorted(load * run.served for run in capacity.values()):
        plans = [poisson(rate, seconds, seed) for seed in range(repeat)]
        requests = [make_requests(len(due), config.vocab_size, beams, seed) for seed, due in enumerate(plans)]
        turns = [[serve(mode, runtime, asked, due) for mode in MODES] for asked, due in zip(requests, plans, strict=True)]
        for by_mode in zip(*turns, strict=True):
            runs += by_mode
            m = median(by_mode)
            latency = f"{1e3 * m.p50:,.1f}", f"{1e3 * m.p99:,.1f}"
            table.add_row(m.mode, f"{m.offered:,.1f}", f"{m.served:,.1f}", f"{m.tokens:,.0f}", *latency)
        ratio = statistics.median(iteration.p99 / static.p99 for static, iteration in turns)
        table.add_row("", "", "", "", "p99, ratio", f"{ratio:.2f}", end_section=True)
    console.print(f"{machine()}; offered: {load:.0%} of what each mode does; medians of {repeat} runs of {seconds:g} s")
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps({"machine": machine(), "runs": [asdict(run) for run in runs]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
