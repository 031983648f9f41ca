"""The seam between the service and the engine.

The service knows only ``EngineClient``. Where the engine runs (a thread of this process, a process of its own) is the business
of the implementation, so it can move without the service noticing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from server.requests import EncodingRequest, Event, GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Where one engine stands, as of its last report."""

    alive: bool
    """It can answer. An engine that has ended may be started again, and is alive once it is warm."""
    live_rows: int
    waiting_requests: int
    waiting_tokens: int
    live_requests: int = 0
    """Requests that own rows."""
    row_capacity: int = 0
    """Most rows there can be; 0 as long as that is not known."""
    engines_up: int = 1
    """Engines that can answer, where several work on one model."""
    progress_age: float = 0.0
    """Seconds since the engine last took a step, while there is work that it has not answered; 0 when it owes nothing."""


Changed = Callable[[Sequence[str]], None]
"""Is told the ids of the requests that got their rows since it was called before."""


class Loss(StrEnum):
    """Why an engine process was lost."""

    DIED = "died"
    STALLED = "stalled"


class EngineClient(Protocol):
    """One engine, serving one model."""

    async def start(self) -> None:
        """Returns when the engine is warm and can answer.

        Raises:
            server.device.session.RuntimeUnavailable: when the device or the model cannot be brought up.
        """

    def submit(self, request: GenerationRequest | EncodingRequest) -> AsyncGenerator[Event, None]:
        """Hands over a request; yields its events, the last of which is Finished, Encoded or Failed.

        Closing the iterator early (``aclose``, or cancelling the task that reads it) cancels the request: its rows are free
        within one step. Never raises: whatever goes wrong arrives as Failed.
        """

    @property
    def status(self) -> EngineStatus: ...

    def listen(self, changed: Changed) -> None:
        """Has ``changed`` called, in the event loop, whenever the status has changed: after each step, and after each loss."""

    async def drain(self, timeout: float) -> None:
        """Refuses new requests, waits up to ``timeout`` seconds for those in flight, then fails the rest and stops.

        May be called again while it waits, with a shorter time.
        """
