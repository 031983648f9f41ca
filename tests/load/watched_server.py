"""``python -m tests.load.watched_server [--plant-leak BYTES] ARGUMENTS``: the server of ``python -m server``, with more to see.

Its metrics page has two series more, ``asyncio_tasks`` and ``malloc_in_use_bytes``; the second counts Python's objects too when
Python takes its memory from malloc (``COUNTED``). At SIGUSR2 malloc gives back to the system what it keeps for later. With
``--plant-leak`` it keeps so many bytes of every call, so that a check that is to find leaks can be shown to find one.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys

from prometheus_client import Gauge

from server import __main__ as command
from server.call import Call
from server.metrics import Metrics
from server.server import Server
from tests.load.running import anonymous_bytes

PLANT_LEAK = "--plant-leak"
COUNTED = {"PYTHONMALLOC": "malloc"}
"""Environment of a server whose ``malloc_in_use_bytes`` is to count all it uses."""


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    ]


def malloc_in_use() -> int:
    """Bytes that malloc has given out, over all of its arenas and what it has mapped for large pieces, without the garbage that
    Python would collect sooner or later; where the C library does not say, what is resident."""
    gc.collect()
    read = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if read is None:
        return anonymous_bytes(os.getpid())
    read.restype = _MallInfo
    info = read()
    return int(info.uordblks + info.hblkhd)


def give_back() -> None:
    """Returns to the system what malloc keeps of pieces that were freed, where the C library can."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class WatchedServer(Server):
    async def startup(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR2, give_back)
        tasks = Gauge("asyncio_tasks", "Tasks of the event loop.", registry=self._metrics.registry)
        tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
        in_use = Gauge("malloc_in_use_bytes", "Given out by malloc.", registry=self._metrics.registry)
        in_use.set_function(malloc_in_use)
        await super().startup()


class LeakingMetrics(Metrics):
    """Keeps something of every call."""

    leaked_bytes: int

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self._kept: list[bytes] = []

    def call_ended(self, call: Call) -> None:
        self._kept.append(os.urandom(self.leaked_bytes))
        super().call_ended(call)


if __name__ == "__main__":
    for name in COUNTED:
        os.environ.pop(name, None)  # its engines are to be as they always are
    setattr(command, "Server", WatchedServer)  # noqa: B010 (the command's own name for it)
    if PLANT_LEAK in sys.argv:
        at = sys.argv.index(PLANT_LEAK)
        LeakingMetrics.leaked_bytes = int(sys.argv[at + 1])
        del sys.argv[at : at + 2]
        setattr(command, "Metrics", LeakingMetrics)  # noqa: B010
    command.app(prog_name="python -m tests.load.watched_server")
