"""``python -m tests.load.replicas BUNDLE``: replicas are killed and restarted in turn, under load, behind our client.

Every call must be answered, and answered as it was before: nothing lost, nothing wrong. That is the work of the client's
service config (round-robin over the replicas, health checks, retries) and of the server's drain.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from server.client import CallError, Options, TransformerClient
from tests.load import inputs
from tests.load.running import ServerProcess, server_process
from tests.load.subject import GivenBundle
from tests.load.verdict import conclude

_LONGEST_TEXT = 16
"""Characters: the tiny models of our tests take no more."""
_PAUSE_SECONDS = 2.0
"""About, from the return of one replica to the end of the next; a client looks for it once a second."""


@dataclass(slots=True)
class Report:
    calls: int = 0
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """Calls that ended without an answer, by status."""
    ended: Counter[str] = field(default_factory=Counter)
    """Replicas, by how they were ended."""
    slowest: float = 0.0
    """Seconds of one call."""
    seconds: float = 0.0


@dataclass(slots=True)
class Replica:
    """One server that comes back on the same port."""

    bundle: Path
    port: int
    arguments: Sequence[str]
    _running: AsyncExitStack | None = None
    _process: ServerProcess | None = None

    async def start(self) -> None:
        self._running = AsyncExitStack()
        arguments = (*self.arguments, "--port", str(self.port))
        self._process = await self._running.enter_async_context(server_process(self.bundle, *arguments))

    async def end(self, number: signal.Signals) -> None:
        """SIGTERM: it drains; SIGKILL: it is gone."""
        assert self._process is not None
        assert self._running is not None
        os.kill(self._process.pid, number)
        await self._running.aclose()


async def torment(
    bundle: Path,
    endings: Sequence[signal.Signals],
    *,
    calls: int = 0,
    replicas: int = 3,
    callers: int = 16,
    seed: int = 1,
    arguments: Sequence[str] = (),
) -> Report:
    """Ends a replica in each of these ways, in turn, and goes on until there were at least so many ``calls``."""
    rng, report = random.Random(seed), Report()
    group = [Replica(bundle, port, arguments) for port in free_ports(replicas)]
    try:
        await asyncio.gather(*(replica.start() for replica in group))
        target = "ipv4:" + ",".join(f"127.0.0.1:{replica.port}" for replica in group)
        async with TransformerClient(target, timeout=60) as client:
            texts = [text for text in inputs.dates(100, seed) if len(text) <= _LONGEST_TEXT]
            options = Options(beams=1)
            wanted = {text: (await client.generate([text], options))[0].text for text in texts}
            stop = asyncio.Event()

            async def caller() -> None:
                while not stop.is_set():
                    text = rng.choice(texts)
                    began = time.monotonic()
                    try:
                        (result,) = await client.generate([text], options)
                        report.wrong += result.text != wanted[text]
                    except CallError as error:
                        report.lost[error.code.name] += 1
                    report.calls += 1
                    report.slowest = max(report.slowest, time.monotonic() - began)

            load_began = time.monotonic()
            tasks = [asyncio.create_task(caller()) for _ in range(callers)]
            for number, ending in enumerate(endings):
                await asyncio.sleep(_PAUSE_SECONDS * rng.uniform(0.5, 1.5))
                replica = group[number % replicas]
                await replica.end(ending)
                report.ended[ending.name] += 1
                await replica.start()
            while report.calls < calls:
                await asyncio.sleep(0.1)
            stop.set()
            await asyncio.gather(*tasks)
            report.seconds = time.monotonic() - load_began
    finally:
        await asyncio.gather(*(replica.end(signal.SIGTERM) for replica in group), return_exceptions=True)
    return report


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, each a different one because all are held until the last is found."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: GivenBundle,
    rounds: Annotated[int, typer.Option(min=1, help="Kills, and restarts.")] = 20,
    calls: Annotated[int, typer.Option(min=0, help="At least so many in all.")] = 100_000,
    callers: Annotated[int, typer.Option(min=1, help="Calls in flight.")] = 16,
    seed: Annotated[int, typer.Option(help="Fixes the moments and the texts.")] = 1,
) -> None:
    """Starts three servers of its own, and exits with 1 unless every call was answered, and rightly."""
    endings = [ending for _ in range(rounds) for ending in (signal.SIGKILL, signal.SIGTERM)]
    arguments = ("--device", "cpu", "--engines", "1", "--threads", "1")
    report = asyncio.run(torment(bundle, endings, calls=calls, callers=callers, seed=seed, arguments=arguments))
    facts = [
        f"{report.calls} calls in {report.seconds:.0f} s while replicas ended {dict(report.ended)}",
        f"{sum(report.lost.values())} lost {dict(report.lost)}, {report.wrong} answered otherwise than before; the slowest took"
        f" {report.slowest:.2f} s",
    ]
    problems = [f"{count} calls were lost with {code}" for code, count in report.lost.items()]
    if report.wrong:
        problems.append(f"{report.wrong} calls were answered otherwise than before")
    conclude(facts, problems)


if __name__ == "__main__":
    app(prog_name="python -m tests.load.replicas")
