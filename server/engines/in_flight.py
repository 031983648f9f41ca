"""The requests that one engine has been given and has not ended yet, each with what is on its way to its reader.

Both kinds of ``EngineClient`` keep their books here: every request gets exactly one last event, whatever happens to the engine,
and a reader who leaves early has its request cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from server.batch.engine import Addressed
from server.batch.step_stats import StepStats
from server.engines.engine_client import Changed
from server.engines.stepper import Command, Request
from server.requests import Event, Failed, Failure, TokensReady

SHUTTING_DOWN = Failed(Failure.SHUTTING_DOWN, "the server is shutting down")
NOT_RUNNING = Failed(Failure.ENGINE, "the engine is not running")
STOPPED = Failed(Failure.ENGINE, "the engine stopped while it worked on this request")


class _Outbox:
    """Events on their way to one reader.

    Tokens are put to those of the same hypothesis that the reader has not taken yet: one who is behind gets fewer and larger
    pieces, and no more waits for anybody than an output is long.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, TokensReady] = {}
        """By hypothesis, in the order in which they began to wait."""
        self._last: Event | None = None
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        if not isinstance(event, TokensReady):
            self._last = event
        elif (before := self._tokens.get(event.hypothesis)) is None:
            self._tokens[event.hypothesis] = event
        else:
            tokens, scores = before.tokens + event.tokens, before.log_probabilities + event.log_probabilities
            self._tokens[event.hypothesis] = TokensReady(event.hypothesis, tokens, scores)
        self._arrived.set()

    async def get(self) -> Event:
        """The next event, when there is one; not to be called after the last one."""
        await self._arrived.wait()
        if not self._tokens:
            assert self._last is not None
            return self._last
        event = self._tokens.pop(next(iter(self._tokens)))
        if not self._tokens and self._last is None:
            self._arrived.clear()
        return event


class InFlight:
    """Lives in the event loop; nothing here is shared with another thread."""

    def __init__(self) -> None:
        self.alive = False
        """The engine takes requests."""
        self.draining = False
        self.live_rows = self.live_requests = 0
        """As of the engine's last step."""
        self._outboxes: dict[str, _Outbox] = {}
        self._unanswered: dict[str, int] = {}
        """Input tokens of each request whose last event has not come yet; one that has come may still wait for its reader."""
        self._tokens = 0
        self.listeners: list[Changed] = []
        """Called when any of this has changed in a way that its reader cannot see."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def unanswered(self) -> int:
        """Requests that the engine has yet to end."""
        return len(self._unanswered)

    @property
    def waiting_requests(self) -> int:
        # Counted here, not by the engine, so that a burst which it has not seen yet counts too.
        return max(0, len(self._unanswered) - self.live_requests)

    @property
    def waiting_tokens(self) -> int:
        return self._tokens * self.waiting_requests // max(1, len(self._unanswered))

    async def run(self, request: Request, send: Callable[[Command], None]) -> AsyncGenerator[Event, None]:
        """Hands the request over with ``send`` and yields its events; sends its id when the reader leaves before the last."""
        if self.draining or not self.alive:
            yield SHUTTING_DOWN if self.draining else NOT_RUNNING
            return
        outbox = self._outboxes[request.id] = _Outbox()
        self._unanswered[request.id] = len(request.input_ids)
        self._tokens += len(request.input_ids)
        self._idle.clear()
        send(request)
        forgotten = False
        try:
            while True:
                event = await outbox.get()
                if not isinstance(event, TokensReady):
                    self._forget(request.id)
                    forgotten = True
                    yield event
                    return
                yield event
        finally:
            if not forgotten and self._forget(request.id) and self.alive:  # left before the end
                send(request.id)

    def deliver(self, events: Iterable[Addressed], *steps: StepStats) -> None:
        """What these steps have brought, one at least."""
        self.hand_out(events)
        if self._unanswered:
            self.live_rows, self.live_requests = steps[-1].live_rows, steps[-1].live_requests
        self._tell([request_id for stats in steps for request_id in stats.joined])

    def hand_out(self, events: Iterable[Addressed]) -> None:
        """To those who wait for them; what nobody waits for any more is forgotten."""
        for request_id, event in events:
            outbox = self._outboxes.get(request_id)
            if outbox is not None:
                outbox.put(event)
                if not isinstance(event, TokensReady):
                    self._answered(request_id)

    def fail_all(self, failed: Failed) -> None:
        """The last event of everything that is under way."""
        for request_id in list(self._unanswered):
            self._outboxes[request_id].put(failed)
            self._answered(request_id)
        self._tell()

    async def drain(self, timeout: float) -> None:
        """Takes no more; waits up to ``timeout`` seconds for what is under way, then fails it."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        self.fail_all(SHUTTING_DOWN)

    def _tell(self, joined: Sequence[str] = ()) -> None:
        for changed in self.listeners:
            changed(joined)

    def _answered(self, request_id: str) -> None:
        self._tokens -= self._unanswered.pop(request_id, 0)
        if not self._unanswered:
            self.live_rows = self.live_requests = 0  # no step will say so

    def _forget(self, request_id: str) -> bool:
        """False when the engine has ended it before."""
        del self._outboxes[request_id]
        if not self._outboxes:
            self._idle.set()
        left = request_id in self._unanswered
        self._answered(request_id)
        return left
