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
from typing import Protocol

from server.engine import Addressed
from server.engine_client import EngineStatus
from server.requests import EncodingRequest, Event, Failed, Failure, GenerationRequest, TokensReady
from server.step_stats import StepStats

log = logging.getLogger(__name__)

Request = GenerationRequest | EncodingRequest


class Stepper(Protocol):
    """What ``Engine`` and ``EncodingEngine`` have in common."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request, /) -> None: ...
    def cancel(self, request_id: str, /) -> None: ...
    def step(self) -> tuple[list[Addressed], StepStats]: ...


@dataclass(slots=True)
class _Inbox:
    """Commands on their way to the engine's thread; every field under ``changed``."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    commands: deque[Request | str] = field(default_factory=deque)
    """A request to submit, or the id of one to cancel."""
    closed: bool = False

    def put(self, command: Request | str) -> None:
        with self.changed:
            self.commands.append(command)
            self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def take(self, *, wait: bool) -> list[Request | str] | None:
        """All commands so far, in order; None once closed. Sleeps until there is something if ``wait``."""
        with self.changed:
            while wait and not self.commands and not self.closed:
                self.changed.wait()
            commands = list(self.commands)
            self.commands.clear()
            return None if self.closed else commands


class InProcessEngine:
    """Runs an engine in a thread.

    Args:
        build: makes the engine, loaded and warm; called in the engine's thread.
        on_step: told of every step, in the event loop.
    """

    def __init__(self, name: str, build: Callable[[], Stepper], on_step: Callable[[StepStats], None]) -> None:
        self.name = name
        self._build, self._on_step = build, on_step
        self._inbox = _Inbox()
        self._thread: threading.Thread | None = None
        self._outboxes: dict[str, asyncio.Queue[Event]] = {}
        self._tokens_in_flight = 0
        self._alive, self._draining = False, False
        self._live_rows = self._live_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Raises whatever ``build`` raises (``server.runtime.RuntimeUnavailable``)."""
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=f"engine {self.name}", daemon=True)
        self._thread.start()
        await ready
        self._alive = True

    @property
    def status(self) -> EngineStatus:
        # Counted here, not by the engine, so that a burst which it has not seen yet counts too.
        in_flight = len(self._outboxes)
        waiting = max(0, in_flight - self._live_requests)
        return EngineStatus(
            alive=self._alive,
            live_rows=self._live_rows,
            waiting_requests=waiting,
            waiting_tokens=self._tokens_in_flight * waiting // max(1, in_flight),
        )

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        if self._draining or not self._alive:
            failure = Failure.SHUTTING_DOWN if self._draining else Failure.ENGINE
            yield Failed(failure, "the server is shutting down" if self._draining else "the engine is not running")
            return
        outbox = self._outboxes[request.id] = asyncio.Queue()
        self._tokens_in_flight += len(request.input_ids)
        self._idle.clear()
        self._inbox.put(request)
        try:
            while True:
                event = await outbox.get()
                if not isinstance(event, TokensReady):
                    self._forget(request)
                    yield event
                    return
                yield event
        finally:
            if self._forget(request):  # left before the end
                self._inbox.put(request.id)

    async def drain(self, timeout: float) -> None:
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        self._fail_all(Failed(Failure.SHUTTING_DOWN, "the server is shutting down"))
        self._inbox.close()
        if self._thread is not None:  # also one that is just dying
            await asyncio.to_thread(self._thread.join)
        self._alive = False

    def _forget(self, request: Request) -> bool:
        """False when it was forgotten before."""
        if self._outboxes.pop(request.id, None) is None:
            return False
        self._tokens_in_flight -= len(request.input_ids)
        if not self._outboxes:
            self._live_rows = self._live_requests = 0  # no step will say so
            self._idle.set()
        return True

    def _fail_all(self, failed: Failed) -> None:
        for outbox in self._outboxes.values():
            outbox.put_nowait(failed)

    def _deliver(self, events: list[Addressed], stats: StepStats) -> None:
        """One step's news, in the event loop."""
        self._live_rows, self._live_requests = stats.live_rows, stats.live_requests
        for request_id, event in events:
            outbox = self._outboxes.get(request_id)
            if outbox is not None:
                outbox.put_nowait(event)
        self._on_step(stats)

    def _die(self) -> None:
        self._alive = False
        self._fail_all(Failed(Failure.ENGINE, "the engine stopped while it worked on this request"))

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
            for command in commands:
                if isinstance(command, str):
                    engine.cancel(command)
                else:
                    engine.submit(command)
            if engine.has_work:
                self._call(self._deliver, *engine.step())

    def _call(self, function: Callable[..., object], *args: object) -> None:
        """Runs ``function`` in the event loop, unless that has ended already."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)
