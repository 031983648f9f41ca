"""Several engines of one model as one ``EngineClient``: each request goes to the engine with the least to do.

On a CPU, n engines of one thread each make more tokens a second than one engine of n threads: they never wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from server.engines.engine_client import Changed, EngineClient, EngineStatus
from server.requests import EncodingRequest, Event, GenerationRequest


class EnginePool:
    """Serves as long as one of its engines does."""

    def __init__(self, engines: Sequence[EngineClient]) -> None:
        self._engines = tuple(engines)

    async def start(self) -> None:
        """Raises what the first engine that cannot be started raises."""
        await asyncio.gather(*(engine.start() for engine in self._engines))

    def submit(self, request: GenerationRequest | EncodingRequest) -> AsyncGenerator[Event, None]:
        return min(self._engines, key=lambda engine: _load(engine.status)).submit(request)

    @property
    def status(self) -> EngineStatus:
        each = [engine.status for engine in self._engines]
        return EngineStatus(
            alive=any(status.alive for status in each),
            live_rows=sum(status.live_rows for status in each),
            live_requests=sum(status.live_requests for status in each),
            row_capacity=sum(status.row_capacity for status in each),
            waiting_requests=sum(status.waiting_requests for status in each),
            waiting_tokens=sum(status.waiting_tokens for status in each),
            engines_up=sum(status.engines_up for status in each),
            progress_age=max(status.progress_age for status in each),
        )

    def listen(self, changed: Changed) -> None:
        for engine in self._engines:
            engine.listen(changed)

    async def drain(self, timeout: float) -> None:
        await asyncio.gather(*(engine.drain(timeout) for engine in self._engines))


def _load(status: EngineStatus) -> tuple[bool, int, int]:
    """What makes an engine a worse choice: not running, then requests, then rows."""
    return not status.alive, status.live_requests + status.waiting_requests, status.live_rows
