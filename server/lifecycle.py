"""A server's life: ``startup``, ``main_loop``, ``shutdown``. What a server of one process and one of several have in common."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from server.config import ServerOptions
from server.http import Page, PagesServer


class CannotServe(RuntimeError):
    """The server cannot begin: one line saying why."""


class Lifecycle(ABC):
    """Serves until asked to stop. Starts nothing until ``startup``."""

    def __init__(self) -> None:
        self._stop, self._force = asyncio.Event(), asyncio.Event()

    async def serve(self) -> None:
        """Returns after ``ask_to_stop``, when everything has ended. Raises what ``startup`` raises."""
        try:
            await self.startup()
            await self.main_loop()
        finally:
            await self.shutdown()

    def ask_to_stop(self) -> None:
        """The first time: finish what is in flight. The second time: now."""
        (self._force if self._stop.is_set() else self._stop).set()

    @abstractmethod
    async def startup(self) -> None:
        """Begins. Raises CannotServe when that is not possible."""

    @abstractmethod
    async def main_loop(self) -> None:
        """Returns after ``ask_to_stop``."""

    @abstractmethod
    async def shutdown(self) -> None:
        """Gives back everything, however far ``startup`` came."""


def open_pages(options: ServerOptions, pages: Mapping[str, Page]) -> PagesServer:
    """Raises CannotServe when the port is taken."""
    try:
        return PagesServer(options.host, options.http_port, pages)
    except OSError as error:
        raise CannotServe(f"cannot listen on {options.address(options.http_port)}: {error.strerror}") from None


async def done_before(event: asyncio.Event, work: asyncio.Future[Any], seconds: float | None = None) -> bool:
    """Waits for the work, but not beyond the event or this time; True when the work is done."""
    interruption = asyncio.ensure_future(event.wait())
    futures: list[asyncio.Future[Any]] = [work, interruption]
    await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    interruption.cancel()
    return work.done()


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Returns when the event is set, or after this time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
