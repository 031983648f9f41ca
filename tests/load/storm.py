"""``python -m tests.load.storm BUNDLE``: callers who leave and deadlines that pass, at random moments. Nothing may stay behind.

The server runs in this process, so that tasks can be counted beside rows and descriptors. One storm goes over an engine in a
process of its own, as it is served; another over one in this process, where every step can be seen, and for whom it was.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import grpc
import typer

from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc
from server.batch.step_stats import StepStats
from server.config import Device, EngineOptions, EnginePlace, ServerOptions
from server.engines.in_process import InProcessEngine
from server.loading import load_model
from server.metrics import Metrics
from server.server import Server
from tests.load.observed_engine import ObservedEngine
from tests.load.subject import GivenBundle
from tests.load.verdict import conclude

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is there of each kind; the difference between two of these is what stayed behind."""

    tasks: int
    descriptors: int
    rows: int
    waiting: int

    @classmethod
    def now(cls, server: Server) -> Left:
        status = [model.engine.status for model in server.models]
        return cls(
            tasks=len(asyncio.all_tasks()),
            descriptors=len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            rows=sum(one.live_rows for one in status),
            waiting=sum(one.waiting_requests for one in status),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    ends: Counter[str]
    """How the calls ended, as their callers saw it."""
    before: Left
    after: Left
    wasted_tokens: int
    steps_after_leaving: Counter[int] = field(default_factory=Counter)
    """Of requests whose caller left, by how many steps began before the engine took note: only seen in this process."""
    misdeeds: Counter[str] = field(default_factory=Counter)
    """Of the engine, after it had taken note."""

    @property
    def problems(self) -> list[str]:
        found = [f"{count} times {misdeed}" for misdeed, count in self.misdeeds.items()]
        if self.after != self.before:
            found.append(f"not as it was: {self.before} before, {self.after} after")
        if (most := max(self.steps_after_leaving, default=0)) > 1:
            found.append(f"a request was computed for {most} steps after its caller had left")
        return found


async def storm(
    bundle: Path,
    calls: int,
    *,
    place: EnginePlace = EnginePlace.PROCESS,
    at_once: int = 64,
    longest: float = 0.2,
    seed: int = 1,
) -> Report:
    """Args: longest: seconds within which each call is abandoned, unless it was answered before."""
    metrics, wasted = Metrics("storm"), 0
    observed: ObservedEngine | None = None

    def on_step(name: str, stats: StepStats) -> None:
        nonlocal wasted
        wasted += stats.wasted_tokens
        metrics.step_done(name, stats)

    options = ServerOptions(port=0, http_port=0, notice_seconds=0)
    model = load_model(bundle, EngineOptions(device=Device.CPU, engines=1, place=place), on_step)
    if isinstance(model.engine, InProcessEngine):
        observed = ObservedEngine(model.engine, partial(on_step, model.name))
        model = replace(model, engine=observed)
    server = Server([model], options, metrics)
    life = asyncio.create_task(server.serve())
    await _until(lambda: server.serving or life.done())
    try:
        rng, ends, numbers = random.Random(seed), Counter[str](), iter(range(calls))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = transformer_pb2_grpc.TransformerStub(channel)
            for _ in range(4):
                await stub.Generate(_request(rng), timeout=30)
            await asyncio.sleep(0.1)
            before = Left.now(server)

            async def caller() -> None:
                for _ in numbers:
                    ends[await _abandoned_call(stub, rng, longest)] += 1

            await asyncio.gather(*(caller() for _ in range(at_once)))
            after = await _settled(server, before)
            await stub.Generate(_request(rng), timeout=30)  # which also brings the count of the last waste
        report = Report(ends=ends, before=before, after=after, wasted_tokens=wasted)
        if observed is not None and observed.stepper is not None:
            seen = observed.stepper
            report = replace(report, steps_after_leaving=seen.steps_after_leaving, misdeeds=seen.problems)
        return report
    finally:
        server.ask_to_stop()
        await life


async def _abandoned_call(stub: transformer_pb2_grpc.TransformerStub, rng: random.Random, longest: float) -> str:
    """By the caller's own will, or by its deadline."""
    seconds, streams, cancels = rng.uniform(0, longest), rng.random() < 0.5, rng.random() < 0.5
    method = stub.GenerateStream if streams else stub.Generate
    # A connection that breaks ends the calls on it, and no others: those after it wait for the next.
    call = method(_request(rng), timeout=60 if cancels else max(0.001, seconds), wait_for_ready=True)
    if cancels:
        asyncio.get_running_loop().call_later(seconds, call.cancel)
    try:
        if streams:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    except asyncio.CancelledError:
        return "CANCELLED"
    return "OK"


def _request(rng: random.Random) -> pb.GenerateRequest:
    text = "".join(rng.choices(_LETTERS, k=rng.randint(1, 12)))
    beams = rng.choice([1, 1, 1, 2])
    return pb.GenerateRequest(inputs=[pb.Input(text=text)] * rng.choice([1, 1, 3]), options=pb.GenerationOptions(beams=beams))


async def _settled(server: Server, before: Left) -> Left:
    """Within a second everything is as it was, or stays as it is."""
    for _ in range(200):
        if (after := Left.now(server)) == before:
            break
        await asyncio.sleep(0.005)
    return after


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: GivenBundle,
    calls: Annotated[int, typer.Option(min=1, help="Calls that are abandoned, with the engine in each place.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Fixes what is asked and when it is abandoned.")] = 1,
) -> None:
    """Exits with 1 unless rows, tasks and descriptors are what they were before, and no step was computed for who had left."""
    facts, problems = list[str](), list[str]()
    for place in EnginePlace:
        report = asyncio.run(storm(bundle, calls, place=place, seed=seed))
        facts += [
            f"engine {place}: calls as their callers saw them: {dict(report.ends)}",
            f"  before: {report.before}, after: {report.after}",
            f"  tokens computed for calls that were abandoned: {report.wasted_tokens}",
        ]
        if report.steps_after_leaving:
            facts.append(
                f"  {report.steps_after_leaving.total()} requests were cancelled in the engine; steps that began after their"
                f" callers had left, by how many: {dict(sorted(report.steps_after_leaving.items()))}"
            )
        problems += report.problems
    conclude(facts, problems)


if __name__ == "__main__":
    app(prog_name="python -m tests.load.storm")
