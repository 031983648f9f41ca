"""``python -m tests.bench.isolation [BUNDLE]``: what it costs to have the engine in a process of its own.

Both kinds are driven in turn by the same load, without gRPC, in one run: one request at a time, by one and then by the other,
for the latency that the way to the process adds; then many at once for the throughput. A machine that is slow for a moment is
slow for both, so it is pairs that are compared: medians over the rounds, and their range.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from export.bundle import Bundle, open_bundle
from server.engines.build_engine import build_engine
from server.engines.engine_client import EngineClient
from server.engines.engine_spec import EngineSpec
from server.engines.in_process import InProcessEngine
from server.engines.remote_engine import RemoteEngine
from server.requests import Decoding, GenerationRequest
from tests.bench.bundles import shape_bundle

_FIRST_WORD = 4
"""Ids below are special."""


@dataclass(slots=True)
class Figures:
    """Of one kind of engine, one value for each round."""

    single: list[float] = field(default_factory=list)
    """Median seconds of a request alone."""
    outside: list[float] = field(default_factory=list)
    """Of these, median seconds outside the engine's steps."""
    rate: list[float] = field(default_factory=list)
    """Requests a second with many in flight."""


@dataclass(slots=True)
class Contender:
    """One kind of engine, and what its steps have taken."""

    engine: EngineClient
    in_steps: list[float]

    async def run(self, request: GenerationRequest) -> None:
        async with aclosing(self.engine.submit(request)) as events:
            async for _ in events:
                pass

    async def time(self, request: GenerationRequest) -> tuple[float, float]:
        """Seconds of a request alone, and those of them outside the steps."""
        self.in_steps.clear()
        began = time.perf_counter()
        await self.run(request)
        seconds = time.perf_counter() - began
        return seconds, seconds - sum(self.in_steps)


async def rate_of(one: Contender, requests: list[GenerationRequest], at_once: int) -> float:
    queue = iter(requests)

    async def caller() -> None:
        for request in queue:
            await one.run(request)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return len(requests) / (time.perf_counter() - began)


async def measure(both: dict[str, Contender], requests: list[GenerationRequest], at_once: int) -> dict[str, Figures]:
    """One round of each kind of load; whose turn is first changes from request to request, and from round to round."""
    turn = list(both)
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in both}
    for request in requests[: len(requests) // 8]:
        turn.reverse()
        for kind in turn:
            times[kind].append(await both[kind].time(request))
    rates = {kind: await rate_of(both[kind], requests, at_once) for kind in turn}
    medians = {kind: [[statistics.median(column)] for column in zip(*times[kind], strict=True)] for kind in both}
    return {kind: Figures(*medians[kind], [rates[kind]]) for kind in both}


def requests_for(bundle: Bundle, count: int, stream: bool) -> list[GenerationRequest]:
    rng, vocabulary = random.Random(0), bundle.manifest.model["vocab_size"]
    longest = min(24, bundle.manifest.limits["max_input_tokens"])
    decoding = Decoding(max_tokens=16, min_tokens=16)
    return [
        GenerationRequest(
            id=f"r{number}",
            input_ids=tuple(rng.randrange(_FIRST_WORD, vocabulary) for _ in range(rng.randint(4, longest))),
            decoding=decoding,
            stream=stream,
        )
        for number in range(count)
    ]


async def compare(path: Path, precision: str, rounds: int, count: int, at_once: int, stream: bool) -> dict[str, Figures]:
    bundle = open_bundle(path)
    spec = EngineSpec(bundle=str(path), fingerprint=bundle.fingerprint, precision=precision, rows=32, device="cpu", threads=1)
    here, there = list[float](), list[float]()
    both = {
        "in-process": Contender(
            InProcessEngine("here", partial(build_engine, spec), lambda stats: here.append(stats.seconds)), here
        ),
        "process": Contender(RemoteEngine("there", spec, lambda stats: there.append(stats.seconds)), there),
    }
    requests = requests_for(bundle, count, stream)
    figures = {kind: Figures() for kind in both}
    for one in both.values():
        await one.engine.start()
    await measure(both, requests[:64], at_once)  # warm
    for number in range(rounds):
        order = dict(sorted(both.items(), reverse=number % 2 == 1))
        for kind, own in (await measure(order, requests, at_once)).items():
            figures[kind].single += own.single
            figures[kind].outside += own.outside
            figures[kind].rate += own.rate
    for one in both.values():
        await one.engine.drain(5)
    return figures


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory made by `python -m export`, of a model that generates; or --shape.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Without a bundle: one made for the purpose, tiny or base.")] = "tiny",
    precision: Annotated[str, typer.Option(help="Graphs of the bundle that run.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    requests: Annotated[int, typer.Option(min=64, help="In each round.")] = 512,
    at_once: Annotated[int, typer.Option(min=1, help="Requests in flight where the rate is measured.")] = 32,
    stream: Annotated[bool, typer.Option(help="Report every token as it becomes final.")] = True,
) -> None:
    figures = asyncio.run(compare(bundle or shape_bundle(shape), precision, rounds, requests, at_once, stream))
    for kind, own in figures.items():
        single, outside, rate = (statistics.median(values) for values in (own.single, own.outside, own.rate))
        print(
            f"{kind:10}: alone {single * 1000:7.2f} ms ({min(own.single) * 1000:.2f} to {max(own.single) * 1000:.2f}),"
            f" {outside * 1000:.2f} outside its steps;"
            f" {at_once} in flight: {rate:7.1f} requests/s ({min(own.rate):.1f} to {max(own.rate):.1f})"
        )
    here, there = figures["in-process"], figures["process"]
    added = sorted((b - a) * 1000 for a, b in zip(here.single, there.single, strict=True))
    outside = statistics.median(b - a for a, b in zip(here.outside, there.outside, strict=True)) * 1000
    share = sorted(b / a for a, b in zip(here.rate, there.rate, strict=True))
    print(
        f"the process adds {statistics.median(added):.2f} ms to a request alone ({added[0]:.2f} to {added[-1]:.2f}; outside its"
        f" steps {outside:.2f}), and serves {statistics.median(share):.1%} of the rate ({share[0]:.1%} to {share[-1]:.1%})"
    )


if __name__ == "__main__":
    app(prog_name="python -m tests.bench.isolation")
