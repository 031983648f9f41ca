"""One front end process, kept running: it takes calls, and the process that owns the engines watches it from here.

One that dies or hangs is replaced. Only its own calls are lost with it: their connections break, which callers see as
UNAVAILABLE, and what they had asked for is withdrawn from the engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.engines.child_link import ChildLink
from server.engines.engine_client import EngineStatus, Loss
from server.engines.remote_engine import Supervision
from server.front_ends.desk import Desk
from server.front_ends.front_wire import (
    Alive,
    Begin,
    FromFrontEnd,
    Orders,
    Standing,
    ToFrontEnd,
    decode_from_front_end,
    encode,
)
from server.waiting.room import Room

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
"""How often it is looked at."""


class FrontEndUnavailable(Exception):
    """It cannot be brought up: one line saying why."""


class FrontEnd:
    """A process that takes calls.

    Args:
        begin: what it is to be.
        rooms: where its requests wait, in the order of ``begin.bundles``.
        environment: added to this process's own.
        on_loss: told of every process that was lost after it had begun.
    """

    def __init__(
        self,
        begin: Begin,
        rooms: Sequence[Room],
        environment: Mapping[str, str],
        on_loss: Callable[[Loss], None] = lambda loss: None,
        supervision: Supervision | None = None,
    ) -> None:
        self._begin, self._rooms, self._environment, self._on_loss = begin, rooms, environment, on_loss
        self._supervision = supervision or Supervision()
        self._launches = 0
        self._link: ChildLink[FromFrontEnd] | None = None
        self._desk: Desk | None = None
        self._begun: asyncio.Future[None] | None = None
        self._heard = 0
        self._serving = False
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._link.pid if self._link else None

    @property
    def serving(self) -> bool:
        """What its health says."""
        return self._serving

    async def start(self) -> None:
        """Raises FrontEndUnavailable when the first process cannot be brought up; later ones are tried again and again."""
        first = await self._launch()
        self._keeper = asyncio.create_task(self._keep_running(first), name=f"keeper of front end {self._begin.number}")

    def tell(self, statuses: Sequence[EngineStatus]) -> None:
        """How the models stand."""
        self._send(Standing(tuple(statuses)))

    async def stop(self, seconds: float) -> None:
        """Asks it to finish its calls and end; kills it after this time."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if (link := self._link) is not None:
            link.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.ended(), seconds)
        await self._end_process()

    def hurry(self) -> None:
        """After ``stop``: no call is worth waiting for any more."""
        if self._link is not None:
            self._link.terminate()

    def _send(self, message: ToFrontEnd) -> None:
        if self._link is not None:
            self._link.send(encode(message))

    def _receive(self, message: FromFrontEnd) -> None:
        self._heard += 1
        if isinstance(message, Orders):
            if self._desk is not None:
                self._desk.take(message)
        elif isinstance(message, Alive):
            self._serving = message.serving
            if self._begun is not None and not self._begun.done():
                self._begun.set_result(None)
        elif self._begun is not None and not self._begun.done():
            self._begun.set_exception(FrontEndUnavailable(message.message))
        else:
            _log.error("front end cannot serve", extra={"front_end": self._begin.number, "error": message.message})

    async def _launch(self) -> ChildLink[FromFrontEnd]:
        """A process whose event loop turns. Raises FrontEndUnavailable."""
        self._launches += 1
        self._begun = asyncio.get_running_loop().create_future()
        link = self._link = await ChildLink[FromFrontEnd].start(
            "server.front_ends.front_end_process", decode_from_front_end, self._receive, self._environment
        )
        self._desk = Desk(f"{self._begin.number}.{self._launches}/", self._rooms, self._send)
        self._send(self._begin)
        ended = asyncio.create_task(link.ended())
        try:
            answers: list[asyncio.Future[Any]] = [self._begun, ended]
            await asyncio.wait(answers, timeout=self._supervision.start_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not self._begun.done():
                how = f"ended with code {ended.result()}" if ended.done() else "was not ready in time"
                raise FrontEndUnavailable(f"front end {self._begin.number} {how}")
            self._begun.result()
        except BaseException:
            await self._end_process()
            raise
        finally:
            ended.cancel()
        return link

    async def _keep_running(self, link: ChildLink[FromFrontEnd]) -> None:
        """Watches one process after the other."""
        limits, backoff = self._supervision, 0.0
        while True:
            began = time.monotonic()
            loss, code = await self._watch(link)
            facts = {"front_end": self._begin.number, "pid": link.pid, "loss": loss.value, "exit_code": code}
            _log.error("front end lost", extra={**facts, "requests": self._desk.in_hand if self._desk else 0})
            self._on_loss(loss)
            await self._end_process()
            if time.monotonic() - began >= limits.healthy_seconds:
                backoff = 0.0
            while True:
                await asyncio.sleep(backoff)
                backoff = min(limits.longest_backoff_seconds, max(limits.first_backoff_seconds, 2 * backoff))
                try:
                    link = await self._launch()
                    break
                except (FrontEndUnavailable, OSError) as error:
                    _log.error("front end cannot start", extra={"front_end": self._begin.number, "error": str(error)})
            _log.warning("front end replaced", extra={"front_end": self._begin.number, "pid": link.pid})

    async def _watch(self, link: ChildLink[FromFrontEnd]) -> tuple[Loss, int | None]:
        """Returns when the process has ended or says nothing any more: why, and its exit code."""
        ended = asyncio.create_task(link.ended())
        silent, heard = 0.0, self._heard
        try:
            while True:
                before = time.monotonic()
                await asyncio.wait([ended], timeout=_LOOK_SECONDS)
                if ended.done():
                    return Loss.DIED, ended.result()
                # No more than this process was itself awake: when both were frozen, the other is not to blame.
                silent += min(time.monotonic() - before, 2 * _LOOK_SECONDS)
                if heard != self._heard:
                    silent, heard = 0.0, self._heard
                if silent >= self._supervision.stall_seconds:
                    return Loss.STALLED, None
        finally:
            ended.cancel()

    async def _end_process(self) -> None:
        self._serving = False
        desk, self._desk = self._desk, None
        if desk is not None:
            desk.close()
        link, self._link = self._link, None
        if link is not None:
            await link.kill()
            link.close()
