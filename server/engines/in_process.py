"""An ``EngineClient`` whose engine runs in a thread of this process.

One thread owns the engine and everything it touches. Commands reach it through a queue, its events come back to the event loop
once a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from server.batch.engine import Addressed
from server.batch.step_stats import StepStats
from server.engines.engine_client import Changed, EngineStatus
from server.engines.in_flight import STOPPED, InFlight
from server.engines.stepper import Command, Request, Stepper, apply
from server.requests import Event

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Inbox:
    """Commands on their way to the engine's thread; every field under ``changed``."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    commands: deque[Command] = field(default_factory=deque)
    closed: bool = False

    def put(self, command: Command) -> None:
        with self.changed:
            self.commands.append(command)
            self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def take(self, *, wait: bool) -> list[Command] | None:
        """All commands so far, in order; None once closed. Sleeps until there is something if ``wait``."""
        with self.changed:
            while wait and not self.commands and not self.closed:
                self.changed.wait()
            commands = list(self.commands)
            self.commands.clear()
            return None if self.closed else commands


class InProcessEngine:
    """Runs an engine in a thread. A fault in it may take this process along, and one that hangs stays: see ``RemoteEngine``.

    Args:
        build: makes the engine, loaded and warm; called in the engine's thread.
        on_step: told of every step, in the event loop.
    """

    def __init__(self, name: str, build: Callable[[], Stepper], on_step: Callable[[StepStats], None]) -> None:
        self.name = name
        self._build, self._on_step = build, on_step
        self._inbox = _Inbox()
        self._thread: threading.Thread | None = None
        self._in_flight = InFlight()
        self._row_capacity = 0

    async def start(self) -> None:
        """Raises whatever ``build`` raises (``server.device.session.RuntimeUnavailable``)."""
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=f"engine {self.name}", daemon=True)
        self._thread.start()
        await ready
        self._in_flight.alive = True

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(
            alive=self._in_flight.alive,
            live_rows=self._in_flight.live_rows,
            live_requests=self._in_flight.live_requests,
            row_capacity=self._row_capacity,
            waiting_requests=self._in_flight.waiting_requests,
            waiting_tokens=self._in_flight.waiting_tokens,
        )

    def listen(self, changed: Changed) -> None:
        self._in_flight.listeners.append(changed)

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        return self._in_flight.run(request, self._inbox.put)

    async def drain(self, timeout: float) -> None:
        await self._in_flight.drain(timeout)
        self._inbox.close()
        if self._thread is not None:  # also one that is just dying
            await asyncio.to_thread(self._thread.join)
        self._in_flight.alive = False

    def _deliver(self, events: list[Addressed], stats: StepStats) -> None:
        """One step's news, in the event loop."""
        self._row_capacity = stats.row_capacity
        self._in_flight.deliver(events, stats)
        self._on_step(stats)

    def _die(self) -> None:
        self._in_flight.alive = False
        self._in_flight.fail_all(STOPPED)

    # In the engine's thread

    def _run(self, ready: asyncio.Future[None]) -> None:
        try:
            engine = self._build()
        except Exception as error:
            self._call(ready.set_exception, error)
            return
        self._call(ready.set_result, None)
        try:
            self._work(engine)
        except Exception:
            log.exception("the engine of %s stopped", self.name)
            self._call(self._die)

    def _work(self, engine: Stepper) -> None:
        while (commands := self._inbox.take(wait=not engine.has_work)) is not None:
            apply(commands, engine)
            if engine.has_work:
                self._call(self._deliver, *engine.step())

    def _call(self, function: Callable[..., object], *args: object) -> None:
        """Runs ``function`` in the event loop, unless that has ended already."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)
