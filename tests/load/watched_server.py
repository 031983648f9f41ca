"""``python -m tests.load.watched_server [--plant-leak] ARGUMENTS``: the server of ``python -m server``, its tasks in sight.

Its metrics page has one series more, ``asyncio_tasks``. With ``--plant-leak`` it keeps 1 KB of every call, so that a check that
is to find leaks can be shown to find one.
"""

from __future__ import annotations

import asyncio
import os
import sys

from prometheus_client import Gauge

from server import __main__ as command
from server.call import Call
from server.metrics import Metrics
from server.server import Server

PLANT_LEAK = "--plant-leak"
LEAKED_BYTES = 1024


class WatchedServer(Server):
    async def startup(self) -> None:
        loop = asyncio.get_running_loop()
        tasks = Gauge("asyncio_tasks", "Tasks of the event loop.", registry=self._metrics.registry)
        tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
        await super().startup()


class LeakingMetrics(Metrics):
    """Keeps something of every call."""

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self._kept: list[bytes] = []

    def call_ended(self, call: Call) -> None:
        self._kept.append(os.urandom(LEAKED_BYTES))
        super().call_ended(call)


if __name__ == "__main__":
    setattr(command, "Server", WatchedServer)  # noqa: B010 (the command's own name for it)
    if PLANT_LEAK in sys.argv:
        sys.argv.remove(PLANT_LEAK)
        setattr(command, "Metrics", LeakingMetrics)  # noqa: B010
    command.app(prog_name="python -m tests.load.watched_server")
