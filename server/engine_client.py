"""The seam between the service and the engine.

The service knows only ``EngineClient``. Where the engine runs (a thread of this process, a process of its own) is the business
of the implementation, so it can move without the service noticing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from server.requests import EncodingRequest, Event, GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Where one engine stands, as of its last report."""

    alive: bool
    """False once the engine can no longer answer; it never becomes True again."""
    live_rows: int
    waiting_requests: int
    waiting_tokens: int


class EngineClient(Protocol):
    """One engine, serving one model."""

    async def start(self) -> None:
        """Returns when the engine is warm and can answer.

        Raises:
            server.runtime.RuntimeUnavailable: when the device or the model cannot be brought up.
        """

    def submit(self, request: GenerationRequest | EncodingRequest) -> AsyncGenerator[Event, None]:
        """Hands over a request; yields its events, the last of which is Finished, Encoded or Failed.

        Closing the iterator early (``aclose``, or cancelling the task that reads it) cancels the request: its rows are free
        within one step. Never raises: whatever goes wrong arrives as Failed.
        """

    @property
    def status(self) -> EngineStatus: ...

    async def drain(self, timeout: float) -> None:
        """Refuses new requests, waits up to ``timeout`` seconds for those in flight, then fails the rest and stops.

        May be called again while it waits, with a shorter time.
        """
