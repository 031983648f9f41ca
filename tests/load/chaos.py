"""``python -m tests.load.chaos BUNDLE``: engine processes are killed and stopped under load, again and again.

Checked in every round: health says NOT_SERVING in time, every call that was in flight ends with a status and in time, and an
engine serves again behind the same front end. Checked at the end: what callers saw is exactly what the server counted.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc
from tests.load.running import ServerProcess, server_process
from tests.load.subject import GivenBundle
from tests.load.verdict import conclude

OUTCOMES = {
    "OK": {"ok"},
    "UNAVAILABLE": {"failed", "rejected"},
    "RESOURCE_EXHAUSTED": {"rejected"},
    "DEADLINE_EXCEEDED": {"deadline"},
    "CANCELLED": {"cancelled"},
}
"""What the server may have counted for each status that a caller got."""
_CALL_SECONDS = 30.0
_PAUSE_SECONDS = 0.02
"""Of a caller who was turned away."""


class Fault(StrEnum):
    KILL = "kill"
    STOP = "stop"

    @property
    def signal(self) -> signal.Signals:
        return signal.SIGKILL if self is Fault.KILL else signal.SIGSTOP


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One fault; times in seconds from the signal."""

    fault: Fault
    in_flight: int
    noticed: float
    """When health turned NOT_SERVING."""
    ended: float
    """When the last call that was in flight had its status."""
    serving: float


@dataclass(slots=True)
class Report:
    rounds: list[Round] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    """Of all calls, as their callers saw them."""
    counted: dict[str, int] = field(default_factory=dict)
    """By outcome, as the server says."""
    problems: list[str] = field(default_factory=list)


class _Load:
    """Callers who call again and again, each with one call in flight, and write down how each ended."""

    def __init__(self, stub: transformer_pb2_grpc.TransformerStub, seed: int) -> None:
        self._stub, self._random = stub, random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.in_flight: dict[int, float] = {}
        self._number = 0
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True

    async def caller(self) -> None:
        while not self._stopping:
            self._number += 1
            number = self._number
            self.in_flight[number] = time.monotonic()
            code = await self._call()
            del self.in_flight[number]
            self.statuses[code] += 1
            if code != "OK":
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _call(self) -> str:
        text = f"{self._random.randrange(1, 29)} {self._random.randrange(1, 13)} {self._random.randrange(1900, 2100)}"
        beams = self._random.choice([1, 1, 2])
        request = pb.GenerateRequest(inputs=[pb.Input(text=text)], options=pb.GenerationOptions(beams=beams))
        try:
            if self._random.random() < 0.5:
                await self._stub.Generate(request, timeout=_CALL_SECONDS)
            else:
                async for _ in self._stub.GenerateStream(request, timeout=_CALL_SECONDS):
                    pass
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"


class _Health:
    """What a watcher of the server's health has been told, and when."""

    def __init__(self) -> None:
        self.serving = False
        self.since = time.monotonic()

    async def watch(self, stub: health_pb2_grpc.HealthStub) -> None:
        async for answer in stub.Watch(health_pb2.HealthCheckRequest(service="")):
            self.serving = answer.status == health_pb2.HealthCheckResponse.SERVING
            self.since = time.monotonic()


async def torment(
    server: ServerProcess,
    faults: list[Fault],
    *,
    callers: int = 32,
    seed: int = 1,
    say: Callable[[Round], None] = lambda _: None,
) -> Report:
    """One round for each fault."""
    report, rng = Report(), random.Random(seed)
    before = await server.series()
    # No retry policy: what the server has seen is not sent again. A call that meets the GOAWAY of a connection of too great an
    # age was not seen, and gRPC itself sends it again (unless grpc.enable_retries is 0).
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.target, options=options) as channel:
        load, health = _Load(transformer_pb2_grpc.TransformerStub(channel), seed), _Health()
        watcher = asyncio.create_task(health.watch(health_pb2_grpc.HealthStub(channel)))
        tasks = [asyncio.create_task(load.caller()) for _ in range(callers)]
        await _until(lambda: health.serving and load.statuses["OK"] >= callers)
        for fault in faults:
            await asyncio.sleep(rng.uniform(0.05, 0.5))
            done = await _one_round(server, fault, load, health)
            report.rounds.append(done)
            say(done)
            good = load.statuses["OK"]
            await _until(lambda good=good: load.statuses["OK"] > good + callers)  # type: ignore[misc]
        load.stop()
        await asyncio.gather(*tasks)
        watcher.cancel()
    report.statuses = load.statuses
    after = await server.series()
    report.counted = {
        outcome: round(after[name, outcome] - before.get((name, outcome), 0))
        for name, outcome in after
        if name == "transformer_requests_total"
    }
    report.problems = _differences(report.statuses, report.counted)
    replaced = sum(value for (name, _), value in after.items() if name == "transformer_engine_restarts_total")
    if replaced != len(faults):
        report.problems.append(f"{len(faults)} faults, but {replaced:g} engine processes were replaced")
    return report


async def _one_round(server: ServerProcess, fault: Fault, load: _Load, health: _Health) -> Round:
    victims = server.engines
    inside = set(load.in_flight)
    struck = time.monotonic()
    for victim in victims:
        os.kill(victim, fault.signal)
    await _until(lambda: not health.serving)
    noticed = health.since - struck
    await _until(lambda: not inside & load.in_flight.keys())
    ended = time.monotonic() - struck
    await _until(lambda: health.serving)
    if set(victims) & set(server.engines):
        raise RuntimeError("an engine process that was given up still exists")
    return Round(fault=fault, in_flight=len(inside), noticed=noticed, ended=ended, serving=health.since - struck)


def _differences(statuses: Counter[str], counted: dict[str, int]) -> list[str]:
    """Where the callers' ledger and the server's counters disagree."""
    problems = [f"{count} calls ended with {code}" for code, count in statuses.items() if code not in OUTCOMES]
    retryable = statuses["UNAVAILABLE"] + statuses["RESOURCE_EXHAUSTED"]
    for what, seen, outcomes in [
        ("OK", statuses["OK"], ("ok",)),
        ("retryable", retryable, ("failed", "rejected")),
        ("DEADLINE_EXCEEDED", statuses["DEADLINE_EXCEEDED"], ("deadline",)),
        ("CANCELLED", statuses["CANCELLED"], ("cancelled",)),
    ]:
        said = sum(counted.get(outcome, 0) for outcome in outcomes)
        if said != seen:
            problems.append(f"callers saw {seen} calls end {what}, the server counted {said}")
    return problems


async def _until(condition: Callable[[], bool], seconds: float = 120) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: GivenBundle,
    rounds: Annotated[int, typer.Option(min=1, help="Of each fault.")] = 20,
    callers: Annotated[int, typer.Option(min=1, help="Calls in flight.")] = 32,
    stall_seconds: Annotated[float, typer.Option(min=0.5, help="Passed to the server.")] = 8.0,
    engines: Annotated[int, typer.Option(min=1, help="Passed to the server; a fault strikes all of them at once.")] = 1,
    seed: Annotated[int, typer.Option(help="Fixes when faults come and what is asked.")] = 1,
) -> None:
    """Starts a server of its own, and exits with 1 unless every promise was kept."""
    faults = [fault for _ in range(rounds) for fault in Fault]

    def say(one: Round) -> None:
        print(
            f"{one.fault.value:5} {one.in_flight:4} in flight: NOT_SERVING after {one.noticed:6.3f} s,"
            f" the last call ended after {one.ended:6.3f} s, SERVING after {one.serving:6.3f} s",
            flush=True,
        )

    async def run() -> Report:
        arguments = ("--stall-seconds", str(stall_seconds), "--engines", str(engines), "--device", "cpu")
        async with server_process(bundle, *arguments) as server:
            return await torment(server, faults, callers=callers, seed=seed, say=say)

    report = asyncio.run(run())
    facts = []
    for fault in Fault:
        own = [one for one in report.rounds if one.fault is fault]
        late = 1.0 if fault is Fault.KILL else stall_seconds + 2
        worst = max(one.noticed for one in own)
        after = max(one.ended - one.noticed for one in own)
        facts.append(
            f"{fault.value}: noticed within {worst:.3f} s, calls in flight ended within {max(0.0, after):.3f} s of that"
        )
        report.problems += [f"{fault.value}: noticed only after {worst:.3f} s"] if worst > late else []
        report.problems += [f"{fault.value}: a call ended only {after:.3f} s later"] if after > 2 else []
    facts.append(f"calls as their callers saw them: {dict(report.statuses)}; as the server counted: {report.counted}")
    conclude(facts, report.problems)


if __name__ == "__main__":
    app(prog_name="python -m tests.load.chaos")
