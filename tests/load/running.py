"""The real command, started as an operator starts it: a server process, what it says, and what it counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

_START_SECONDS = 300


class ServerError(RuntimeError):
    """The server did not come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resting:
    """What a front end holds, seen from outside."""

    descriptors: int
    tasks: int
    threads: int
    memory: int
    """Resident bytes that are no file's."""
    in_use: int
    """Bytes that malloc has given out and not got back: what is left of ``memory`` without what malloc holds for later."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running ``python -m server``."""

    pid: int
    port: int
    http_port: int

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def engines(self) -> list[int]:
        """Process ids of its engines now."""
        return self._children("server.engines.engine_process")

    @property
    def front_ends(self) -> list[int]:
        """Process ids of its front ends now; none when it takes its calls itself."""
        return self._children("server.front_ends.front_end_process")

    def _children(self, module: str) -> list[int]:
        children = list[str]()
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
                children += path.read_text().split()
        return [int(child) for child in children if module.encode() in command_line(child)]

    async def resting(self) -> Resting:
        """Of a server that is a ``tests.load.watched_server``: others do not show their tasks and what they use."""
        series = await self.series()
        return Resting(
            descriptors=_count(self.pid, "fd"),
            tasks=round(series["asyncio_tasks", ""]),
            threads=_count(self.pid, "task"),
            memory=anonymous_bytes(self.pid),
            in_use=round(series["malloc_in_use_bytes", ""]),
        )

    async def given_back(self) -> int:
        """``Resting.memory`` once malloc has returned to the system what it can; of a ``tests.load.watched_server``."""
        os.kill(self.pid, signal.SIGUSR2)
        await asyncio.sleep(1.0)
        return anonymous_bytes(self.pid)

    async def series(self) -> dict[tuple[str, str], float]:
        """Every sample of a scrape, summed over labels but the one that matters: (name, outcome or reason)."""
        text = await asyncio.to_thread(self.scrape)
        found: Counter[tuple[str, str]] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name, sample.labels.get("outcome") or sample.labels.get("reason") or ""] += sample.value
        return dict(found)

    def scrape(self) -> str:
        """What ``/metrics`` answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=300) as response:
            text: str = response.read().decode()
        return text


def command_line(pid: str) -> bytes:
    """Empty for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@asynccontextmanager
async def server_process(
    *arguments: str | Path, module: str = "server", environment: Mapping[str, str] | None = None
) -> AsyncIterator[ServerProcess]:
    """Serves bundles on free ports until the block ends. Raises ServerError.

    Args:
        arguments: bundles and flags, as on the command line.
        module: what is started in the server's place.
        environment: variables that it has beside those of this process.
    """
    free = ("--port", "0", "--http-port", "0")  # the last of two flags counts
    command = [sys.executable, "-m", module, *free, *map(str, arguments)]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})})
    assert process.stderr is not None
    ports: dict[str, int] = {}
    said: list[str] = []
    try:
        async with asyncio.timeout(_START_SECONDS):
            async for line in process.stderr:
                said.append(line.decode())
                entry = json.loads(line) if line.startswith(b"{") else {}
                if "front_end" in entry:  # one of several, which speaks for itself alone
                    continue
                ports.update((key, entry[key]) for key in ("port", "http_port") if key in entry)
                if entry.get("message") == "serving":
                    break
            else:
                raise ServerError("".join(said[-3:]))
        rest = asyncio.create_task(_read_on(process.stderr))
        yield ServerProcess(process.pid, ports["port"], ports["http_port"])
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        await process.wait()
    await rest


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that is no file's."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _count(pid: int, what: str) -> int:
    return len(list(Path(f"/proc/{pid}/{what}").iterdir()))


async def _read_on(stream: asyncio.StreamReader) -> None:
    """A full pipe would stop the server."""
    while await stream.read(65536):
        pass
