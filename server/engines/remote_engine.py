"""An ``EngineClient`` whose engine runs in a process of its own, which may die or hang without taking the service along.

It is watched from here: when the process ends, or takes work and makes no progress, whatever it had in flight fails with a
retryable status, the process is killed if it still exists, and another is started in its place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from server.batch.step_stats import StepStats
from server.device.session import RuntimeUnavailable
from server.engines.engine_client import Changed, EngineStatus, Loss
from server.engines.engine_spec import EngineSpec
from server.engines.in_flight import STOPPED, InFlight
from server.engines.kept_process import KeptProcess, Supervision
from server.engines.stepper import Command, Request
from server.engines.wire import Commands, FromEngine, Ready, Report, Start, Unavailable, decode_from_engine, encode
from server.requests import Event


class RemoteEngine(KeptProcess[FromEngine]):
    """One engine process, kept running.

    Args:
        on_step: told of every step, in the event loop.
        on_loss: told of every process that was lost after it had been ready.
    """

    kind = "engine process"
    unavailable = RuntimeUnavailable

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        on_step: Callable[[StepStats], None],
        on_loss: Callable[[Loss], None] = lambda loss: None,
        supervision: Supervision | None = None,
    ) -> None:
        super().__init__("server.engines.engine_process", decode_from_engine, {"model": name}, on_loss, supervision)
        self.name = name
        self._spec, self._on_step = spec, on_step
        self._in_flight = InFlight()
        self._commands: list[Command] = []
        """To be sent in one message, at the end of this turn of the event loop."""
        self._sent = self._taken = 0
        """Messages of commands: sent to the process, and taken by it as it says."""
        self._last_report = 0.0

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
            progress_age=time.monotonic() - self._last_report if self._in_flight.alive and self._owes_answer else 0.0,
        )

    def listen(self, changed: Changed) -> None:
        self._in_flight.listeners.append(changed)

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        return self._in_flight.run(request, self._command)

    async def drain(self, timeout: float) -> None:
        await self._in_flight.drain(timeout)
        self._in_flight.alive = False
        await self._stop_keeping()
        await self._end_process()

    # To and from the process

    def _command(self, command: Command) -> None:
        if not self._commands:
            asyncio.get_running_loop().call_soon(self._flush)
        self._commands.append(command)

    def _flush(self) -> None:
        if self._link is not None and self._commands:
            if not self._owes_answer:
                self._last_report = time.monotonic()  # until now it owed nothing
            self._sent += 1
            self._send(encode(Commands.of(self._commands)))
        self._commands = []

    def _greet(self) -> None:
        self._sent = self._taken = 0
        self._commands = []
        self._send(encode(Start(self._spec, logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower())))

    def _receive(self, message: FromEngine) -> None:
        self._last_report = time.monotonic()
        if isinstance(message, Report):
            self._taken = message.taken
            if message.steps:
                self._in_flight.deliver(message.unwrap(), *message.steps)
            for stats in message.steps:
                self._on_step(stats)
        elif isinstance(message, Ready):
            self._in_flight.alive = True
            self._ready()
        elif isinstance(message, Unavailable):
            self._cannot_start(message.message)

    def _lost(self) -> dict[str, Any]:
        self._in_flight.alive = False
        self._in_flight.fail_all(STOPPED)
        return {}

    @property
    def _owes_answer(self) -> bool:
        """It has not answered yet what it was given. An idle engine owes nothing, however long it is silent."""
        return self._sent > self._taken or self._in_flight.unanswered > 0
