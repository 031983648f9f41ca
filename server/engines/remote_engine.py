"""An ``EngineClient`` whose engine runs in a process of its own, which may die or hang without taking the service along.

It is watched from here: when the process ends, or takes work and makes no progress, whatever it had in flight fails with a
retryable status, the process is killed if it still exists, and another is started in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from server.batch.step_stats import StepStats
from server.device.runtime import RuntimeUnavailable
from server.engines.child_link import ChildLink
from server.engines.engine_client import EngineStatus, Loss
from server.engines.engine_spec import EngineSpec
from server.engines.in_flight import STOPPED, InFlight
from server.engines.stepper import Command, Request
from server.engines.wire import Commands, FromEngine, Ready, Report, Start, Unavailable, decode_from_engine, encode
from server.requests import Event

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
"""How often progress is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """When an engine process is given up, and how another takes its place."""

    stall_seconds: float = 8.0
    """An engine with work that says nothing for this long is killed. A single step must be shorter."""
    start_seconds: float = 600.0
    """A process that is not warm by then is killed."""
    first_backoff_seconds: float = 0.1
    """Before a second start in a row that fails; doubled with each further one."""
    longest_backoff_seconds: float = 5.0
    healthy_seconds: float = 10.0
    """A process that has lived this long ends the row."""


class RemoteEngine:
    """One engine process, kept running.

    Args:
        on_step: told of every step, in the event loop.
        on_loss: told of every process that was lost after it had been ready.
    """

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        on_step: Callable[[StepStats], None],
        on_loss: Callable[[Loss], None] = lambda loss: None,
        supervision: Supervision | None = None,
    ) -> None:
        self.name = name
        self._spec, self._on_step, self._on_loss = spec, on_step, on_loss
        self._supervision = supervision or Supervision()
        self._in_flight = InFlight()
        self._link: ChildLink[FromEngine] | None = None
        self._warm: asyncio.Future[None] | None = None
        self._commands: list[Command] = []
        """To be sent in one message, at the end of this turn of the event loop."""
        self._sent = self._taken = 0
        """Messages of commands: sent to the process, and taken by it as it says."""
        self._reports = 0
        self._last_report = 0.0
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._link.pid if self._link else None

    async def start(self) -> None:
        """Raises RuntimeUnavailable when the first process cannot be brought up; later ones are tried again and again."""
        first = await self._launch()
        self._keeper = asyncio.create_task(self._keep_running(first), name=f"keeper of {self.name}")

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(
            alive=self._in_flight.alive,
            live_rows=self._in_flight.live_rows,
            live_requests=self._in_flight.live_requests,
            row_capacity=self._spec.rows if self._in_flight.alive else 0,
            waiting_requests=self._in_flight.waiting_requests,
            waiting_tokens=self._in_flight.waiting_tokens,
            engines_up=int(self._in_flight.alive),
            progress_age=time.monotonic() - self._last_report if self._in_flight.alive and self._owes_progress else 0.0,
        )

    def listen(self, changed: Callable[[], None]) -> None:
        self._in_flight.listeners.append(changed)

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        return self._in_flight.run(request, self._send)

    async def drain(self, timeout: float) -> None:
        await self._in_flight.drain(timeout)
        self._in_flight.alive = False
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await self._end_process()

    # To and from the process

    def _send(self, command: Command) -> None:
        if not self._commands:
            asyncio.get_running_loop().call_soon(self._flush)
        self._commands.append(command)

    def _flush(self) -> None:
        if self._link is not None and self._commands:
            if not self._owes_progress:
                self._last_report = time.monotonic()  # until now it owed nothing
            self._sent += 1
            self._link.send(encode(Commands.of(self._commands)))
        self._commands = []

    def _receive(self, message: FromEngine) -> None:
        self._reports += 1
        self._last_report = time.monotonic()
        if isinstance(message, Report):
            self._taken = message.taken
            if message.stats is not None:
                self._in_flight.deliver(message.unwrap(), message.stats)
                self._on_step(message.stats)
        elif self._warm is not None and not self._warm.done():
            if isinstance(message, Ready):
                self._warm.set_result(None)
            elif isinstance(message, Unavailable):
                self._warm.set_exception(RuntimeUnavailable(message.message))

    @property
    def _owes_progress(self) -> bool:
        """It has not answered yet what it was given. An idle engine owes nothing, however long it is silent."""
        return self._sent > self._taken or self._in_flight.unanswered > 0

    # The life of the process

    async def _launch(self) -> ChildLink[FromEngine]:
        """A process that is warm. Raises RuntimeUnavailable."""
        self._warm = asyncio.get_running_loop().create_future()
        self._sent = self._taken = 0
        self._commands = []
        link = self._link = await ChildLink[FromEngine].start(
            "server.engines.engine_process", decode_from_engine, self._receive
        )
        link.send(encode(Start(self._spec, logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower())))
        ended = asyncio.create_task(link.ended())
        try:
            answers: list[asyncio.Future[Any]] = [self._warm, ended]
            await asyncio.wait(answers, timeout=self._supervision.start_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not self._warm.done():
                how = f"ended with code {ended.result()}" if ended.done() else "was not ready in time"
                raise RuntimeUnavailable(f"the engine process of {self.name} {how}")
            self._warm.result()
        except BaseException:
            await self._end_process()
            raise
        finally:
            ended.cancel()
        self._in_flight.alive = True
        return link

    async def _keep_running(self, link: ChildLink[FromEngine]) -> None:
        """Watches one process after the other."""
        backoff = 0.0
        while True:
            began = time.monotonic()
            loss, code = await self._watch(link)
            self._in_flight.alive = False
            self._in_flight.fail_all(STOPPED)
            facts = {"model": self.name, "pid": link.pid, "loss": loss.value, "exit_code": code}
            _log.error("engine process lost", extra=facts)
            self._on_loss(loss)
            if time.monotonic() - began >= self._supervision.healthy_seconds:
                backoff = 0.0
            await self._end_process()
            link, backoff = await self._replace(backoff)
            _log.warning("engine process replaced", extra={"model": self.name, "pid": link.pid})

    async def _replace(self, backoff: float) -> tuple[ChildLink[FromEngine], float]:
        """A new process, however many attempts it takes, and how long to wait before the next loss's first."""
        limits = self._supervision
        while True:
            await asyncio.sleep(backoff)
            backoff = min(limits.longest_backoff_seconds, max(limits.first_backoff_seconds, 2 * backoff))
            try:
                return await self._launch(), backoff
            except (RuntimeUnavailable, OSError) as error:
                _log.error("engine process cannot start", extra={"model": self.name, "error": str(error)})

    async def _watch(self, link: ChildLink[FromEngine]) -> tuple[Loss, int | None]:
        """Returns when the process has ended or makes no progress: why, and its exit code."""
        ended = asyncio.create_task(link.ended())
        silent, reports = 0.0, self._reports
        try:
            while True:
                before = time.monotonic()
                await asyncio.wait([ended], timeout=_LOOK_SECONDS)
                if ended.done():
                    return Loss.DIED, ended.result()
                if reports != self._reports or not self._owes_progress:
                    silent, reports = 0.0, self._reports
                else:
                    # No more than this process was itself awake: when both were frozen, the engine is not to blame.
                    silent += min(time.monotonic() - before, 2 * _LOOK_SECONDS)
                if silent >= self._supervision.stall_seconds:
                    return Loss.STALLED, None
        finally:
            ended.cancel()

    async def _end_process(self) -> None:
        if (link := self._link) is not None:
            self._link = None
            await link.kill()
            link.close()
