"""Says yes to a call, or no with a time to come back. Plain Python: no clock, no gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.engine_client import EngineStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """How much may wait for one engine."""

    max_waiting_requests: int = 1024
    """A call of n inputs counts n times."""
    max_waiting_tokens: int = 131_072
    """Input tokens, so that a few long requests weigh as much as many short ones."""
    retry_after_seconds: float = 1.0
    """What a refused caller is told."""


class Refused(Exception):
    """The queue is full; the same call may succeed after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Admission:
    """Guards one engine's queue.

    What the engine reports as waiting is only part of the truth: calls that have been admitted and have not yet handed their
    requests over count too, or a burst would pass before the first of it is seen.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._requests_on_the_way = 0
        self._tokens_on_the_way = 0

    @contextmanager
    def admit(self, status: EngineStatus, *, requests: int, tokens: int) -> Iterator[None]:
        """Holds a place for a call's requests until they are handed over to the engine, which is the end of the block.

        A call larger than the whole queue is admitted when nothing waits: its size was checked at the door.

        Raises:
            Refused: when the engine's queue has no room for all of them.
        """
        waiting_requests = status.waiting_requests + self._requests_on_the_way
        waiting_tokens = status.waiting_tokens + self._tokens_on_the_way
        if waiting_requests and (
            waiting_requests + requests > self._limits.max_waiting_requests
            or waiting_tokens + tokens > self._limits.max_waiting_tokens
        ):
            raise Refused(
                f"the server is busy: {waiting_requests} requests of {waiting_tokens} tokens are waiting",
                self._limits.retry_after_seconds,
            )
        self._requests_on_the_way += requests
        self._tokens_on_the_way += tokens
        try:
            yield
        finally:
            self._requests_on_the_way -= requests
            self._tokens_on_the_way -= tokens
