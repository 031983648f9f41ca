"""A front end's way to a waiting room that another process keeps, and through it to the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from server.batch.engine import Addressed
from server.call import Call, current_call
from server.engines.engine_client import Changed, EngineStatus
from server.engines.in_flight import STOPPED, InFlight
from server.engines.stepper import Command, Request
from server.requests import Event


class Carrier(Protocol):
    """Takes requests to the other process; those that one call hands over in one turn of the loop travel together."""

    def hand_over(self, model: int, call: Call, request: Request) -> None: ...
    def withdraw(self, model: int, request_id: str) -> None: ...


class RemoteRoom:
    """One model's ``Room``, as a front end sees it.

    Args:
        model: by which number the processes speak of it.
    """

    def __init__(self, model: int, carrier: Carrier) -> None:
        self._model, self._carrier = model, carrier
        self._in_flight = InFlight()
        self._status = EngineStatus(alive=False, live_rows=0, waiting_requests=0, waiting_tokens=0)
        self._warm = asyncio.Event()

    async def start(self) -> None:
        """Returns when an engine can answer."""
        await self._warm.wait()

    @property
    def status(self) -> EngineStatus:
        return self._status

    def listen(self, changed: Changed) -> None:
        self._in_flight.listeners.append(changed)

    def check(self) -> None:
        """Who keeps the queue decides, when it has the requests."""

    def admit(self, requests: Sequence[Request]) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        return self._in_flight.run(request, self._send)

    async def drain(self, timeout: float) -> None:
        await self._in_flight.drain(timeout)

    def _send(self, command: Command) -> None:
        if isinstance(command, str):
            self._carrier.withdraw(self._model, command)
        else:
            self._carrier.hand_over(self._model, current_call.get(), command)

    # Told by the other process

    def stand(self, status: EngineStatus) -> None:
        self._status = status
        self._in_flight.alive = status.alive
        if status.alive:
            self._warm.set()

    def deliver(self, events: Iterable[Addressed]) -> None:
        self._in_flight.hand_out(events)

    def lose(self) -> None:
        """The other process is gone."""
        self._in_flight.alive = False
        self._in_flight.fail_all(STOPPED)
