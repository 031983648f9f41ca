"""A process of our own that is kept running: watched, ended when it hangs, and replaced when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

from server.engines.child_link import ChildLink
from server.engines.engine_client import Loss
from server.engines.message_socket import Message

_LOOK_SECONDS = 0.25
"""How often progress is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """When a process is given up, and how another takes its place."""

    stall_seconds: float = 8.0
    """A process that owes an answer and says nothing for this long is killed. A single step of an engine must be shorter."""
    start_seconds: float = 600.0
    """A process that is not ready by then is killed."""
    first_backoff_seconds: float = 0.1
    """Before a second start in a row that fails; doubled with each further one."""
    longest_backoff_seconds: float = 5.0
    healthy_seconds: float = 10.0
    """A process that has lived this long ends the row."""


class KeptProcess(ABC, Generic[Message]):
    """One process after the other, of which one at a time lives.

    A subclass says what the process is told first (``_greet``), what becomes of its messages (``_receive``, which calls
    ``_ready`` or ``_cannot_start`` once), whether it owes an answer, and what its loss means.

    Args:
        module: run as ``python -m module DESCRIPTOR``.
        facts: which process this is, in every log line about it.
        on_loss: told of every process that was lost after it had been ready.
        environment: added to this process's own.
    """

    kind: ClassVar[str]
    """Of process, in logs."""
    unavailable: ClassVar[type[Exception]]
    """Raised with one line saying why when a process cannot be brought up."""

    def __init__(
        self,
        module: str,
        decode: Callable[[bytes], Message],
        facts: Mapping[str, Any],
        on_loss: Callable[[Loss], None],
        supervision: Supervision | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module, self._decode, self._environment = module, decode, environment
        self._facts, self._on_loss = facts, on_loss
        self._supervision = supervision or Supervision()
        self._log = logging.getLogger(type(self).__module__)
        self._link: ChildLink[Message] | None = None
        self._start: asyncio.Future[None] | None = None
        """Of the process that runs now: done when it is ready, or cannot be."""
        self._heard = 0
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._link.pid if self._link else None

    async def start(self) -> None:
        """Raises ``unavailable`` when the first process cannot be brought up; later ones are tried again and again."""
        first = await self._launch()
        self._keeper = asyncio.create_task(self._keep_running(first), name=f"keeper of {self.kind} {self._facts}")

    @abstractmethod
    def _greet(self) -> None:
        """Begins with a process that has just been spawned."""

    @abstractmethod
    def _receive(self, message: Message) -> None:
        """Takes what the process says, in order, in the event loop."""

    @abstractmethod
    def _lost(self) -> dict[str, Any]:
        """The process is of no use any more: ends what was under way with it. Returns more facts for the log."""

    @property
    def _owes_answer(self) -> bool:
        """Its silence means that it hangs."""
        return True

    def _send(self, data: bytes) -> None:
        """What is sent to no process is lost, as what is sent to one that is gone."""
        if self._link is not None:
            self._link.send(data)

    def _ready(self) -> None:
        if self._start is not None and not self._start.done():
            self._start.set_result(None)

    def _cannot_start(self, why: str) -> None:
        if self._start is not None and not self._start.done():
            self._start.set_exception(self.unavailable(why))
        else:
            self._log.error(f"{self.kind} cannot serve", extra={**self._facts, "error": why})

    async def _stop_keeping(self) -> None:
        """From now on nothing is watched, and nothing replaced."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper

    async def _end_process(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.kill()
            link.close()

    async def _launch(self) -> ChildLink[Message]:
        """A process that is ready. Raises ``unavailable``."""
        self._start = asyncio.get_running_loop().create_future()
        link = self._link = await ChildLink[Message].start(self._module, self._decode, self._hear, self._environment)
        self._greet()
        ended = asyncio.create_task(link.ended())
        try:
            answers: list[asyncio.Future[Any]] = [self._start, ended]
            await asyncio.wait(answers, timeout=self._supervision.start_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not self._start.done():
                how = f"ended with code {ended.result()}" if ended.done() else "was not ready in time"
                which = " ".join(str(fact) for fact in self._facts.values())
                raise self.unavailable(f"{self.kind} {which} {how}")
            self._start.result()
        except BaseException:
            self._lost()
            await self._end_process()
            raise
        finally:
            ended.cancel()
        return link

    def _hear(self, message: Message) -> None:
        if self._link is None:  # a last word of one that was given up and is being killed: it is lost already
            return
        self._heard += 1
        self._receive(message)

    async def _keep_running(self, link: ChildLink[Message]) -> None:
        """Watches one process after the other."""
        backoff = 0.0
        while True:
            began = time.monotonic()
            loss, code = await self._watch(link)
            facts = {**self._facts, "pid": link.pid, "loss": loss.value, "exit_code": code, **self._lost()}
            self._log.error(f"{self.kind} lost", extra=facts)
            self._on_loss(loss)
            await self._end_process()
            if time.monotonic() - began >= self._supervision.healthy_seconds:
                backoff = 0.0
            link, backoff = await self._replace(backoff)
            self._log.warning(f"{self.kind} replaced", extra={**self._facts, "pid": link.pid})

    async def _replace(self, backoff: float) -> tuple[ChildLink[Message], float]:
        """A new process, however many attempts it takes, and how long to wait before the next loss's first."""
        limits = self._supervision
        while True:
            await asyncio.sleep(backoff)
            backoff = min(limits.longest_backoff_seconds, max(limits.first_backoff_seconds, 2 * backoff))
            try:
                return await self._launch(), backoff
            except (self.unavailable, OSError) as error:
                self._log.error(f"{self.kind} cannot start", extra={**self._facts, "error": str(error)})

    async def _watch(self, link: ChildLink[Message]) -> tuple[Loss, int | None]:
        """Returns when the process has ended or hangs: why, and its exit code."""
        ended = asyncio.create_task(link.ended())
        silent, heard = 0.0, self._heard
        try:
            while True:
                before = time.monotonic()
                await asyncio.wait([ended], timeout=_LOOK_SECONDS)
                if ended.done():
                    return Loss.DIED, ended.result()
                if heard != self._heard or not self._owes_answer:
                    silent, heard = 0.0, self._heard
                else:
                    # No more than this process was itself awake: when both were frozen, the other is not to blame.
                    silent += min(time.monotonic() - before, 2 * _LOOK_SECONDS)
                if silent >= self._supervision.stall_seconds:
                    return Loss.STALLED, None
        finally:
            ended.cancel()
