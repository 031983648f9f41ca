"""One front end process, kept running: it takes calls, and the process that owns the engines watches it from here.

One that dies or hangs is replaced. Only its own calls are lost with it: their connections break, which callers see as
UNAVAILABLE, and what they had asked for is withdrawn from the engines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.engines.engine_client import EngineStatus, Loss
from server.engines.kept_process import KeptProcess, Supervision
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


class FrontEndUnavailable(Exception):
    """It cannot be brought up: one line saying why."""


class FrontEnd(KeptProcess[FromFrontEnd]):
    """A process that takes calls.

    Args:
        begin: what it is to be.
        rooms: where its requests wait, in the order of ``begin.bundles``.
        environment: added to this process's own.
        on_loss: told of every process that was lost after it had begun.
    """

    kind = "front end"
    unavailable = FrontEndUnavailable

    def __init__(
        self,
        begin: Begin,
        rooms: Sequence[Room],
        environment: Mapping[str, str],
        on_loss: Callable[[Loss], None] = lambda loss: None,
        supervision: Supervision | None = None,
    ) -> None:
        module, facts = "server.front_ends.front_end_process", {"front_end": begin.number}
        super().__init__(module, decode_from_front_end, facts, on_loss, supervision, environment)
        self._begin, self._rooms = begin, rooms
        self._launches = 0
        self._desk: Desk | None = None
        self._serving = False

    @property
    def serving(self) -> bool:
        """What its health says."""
        return self._serving

    def tell(self, statuses: Sequence[EngineStatus]) -> None:
        """How the models stand."""
        self._say(Standing(tuple(statuses)))

    async def stop(self, seconds: float) -> None:
        """Asks it to finish its calls and end; kills it after this time."""
        await self._stop_keeping()
        if (link := self._link) is not None:
            link.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.ended(), seconds)
        self._lost()
        await self._end_process()

    def hurry(self) -> None:
        """After ``stop``: no call is worth waiting for any more."""
        if self._link is not None:
            self._link.terminate()

    def _say(self, message: ToFrontEnd) -> None:
        self._send(encode(message))

    def _greet(self) -> None:
        self._launches += 1
        self._desk = Desk(f"{self._begin.number}.{self._launches}/", self._rooms, self._say)
        self._say(self._begin)

    def _receive(self, message: FromFrontEnd) -> None:
        if isinstance(message, Orders):
            if self._desk is not None:
                self._desk.take(message)
        elif isinstance(message, Alive):
            self._serving = message.serving
            self._ready()
        else:
            self._cannot_start(message.message)

    def _lost(self) -> dict[str, Any]:
        self._serving = False
        desk, self._desk = self._desk, None
        if desk is None:
            return {}
        requests = desk.in_hand
        desk.close()
        return {"requests": requests}
