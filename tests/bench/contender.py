"""One side of a comparison, in a process of its own: thread pools and environment variables of one side do not touch the other.

A side waits without using the processor while another one works.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Protocol
from unittest import mock

Source = list[int]


class ContenderFailed(Exception):
    """A side that could not be started or failed at a job: one line saying why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Requests of a number of clients, each of which sends its next one when its last one is answered."""

    sources: Sequence[Source]
    clients: int
    beams: int = 1
    length: int | None = None
    """Tokens that every text gets; None: texts end where they end."""
    tuning: dict[str, int] = field(default_factory=dict)
    """Settings of a side that need no new process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    seconds: float
    tokens: int
    """Of the best hypotheses, their ends included."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


Settings = dict[str, int | bool]
Runner = Callable[[Job], Outcome]


class Side(Protocol):
    """What is needed to start one side; pickled, so a frozen dataclass at the top of its file."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are read when the process starts."""

    @property
    def settings(self) -> Settings:
        """What a report says of it."""

    def tunings(self, concurrency: int) -> Iterable[dict[str, int]]:
        """Every ``Job.tuning`` worth trying for waves of so many requests."""

    def open(self) -> Runner:
        """Called in the new process: loads the model."""


class Contender:
    """A running side.

    Raises:
        ContenderFailed: when it does not come up.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(side, far_end))  # it ends when its pipe does
        with mock.patch.dict(os.environ, side.environment):
            self._process.start()
        far_end.close()
        self._receive()

    def run(self, job: Job) -> Outcome:
        self.begin(job)
        return self.end()

    def begin(self, job: Job) -> None:
        """Starts a job; ``end`` waits for its outcome."""
        self._connection.send(job)

    def end(self) -> Outcome:
        outcome = self._receive()
        assert isinstance(outcome, Outcome)
        return outcome

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise ContenderFailed(f"{self.side}: its process ended with {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(side: Side, connection: Connection) -> None:
    """The new process: opens the side, then does jobs until the other end hangs up."""
    try:
        run = side.open()
        gc.freeze()  # as in the engine's process: what is loaded is not looked through again and again
        connection.send("open")
        while True:
            connection.send(run(connection.recv()))
    except EOFError:
        pass
    except Exception as error:
        connection.send(ContenderFailed(f"{side}: {traceback.format_exception_only(error)[-1].strip()}"))
