"""An ``EngineClient`` in front of another: requests wait here for their turn, not in the engine.

The engine is given what it has rows for, and a little more so that rows never stand empty between two steps. What waits here
can still be put in a fair order, costs the engine nothing when its deadline passes, and is not lost with an engine's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace

from server.call import current_call
from server.engines.engine_client import EngineClient, EngineStatus
from server.engines.in_flight import SHUTTING_DOWN
from server.requests import EncodingRequest, Event, Failed, Failure, GenerationRequest, TokensReady
from server.waiting.admission import Admission, AdmissionLimits, Forecast
from server.waiting.fair_queue import FairQueue
from server.waiting.service_rate import ServiceRate

Request = GenerationRequest | EncodingRequest

TOO_LATE = Failed(Failure.OVERLOADED, "the server is busy: the answer would have come after the call's deadline")

_LOOKAHEAD = 0.25
"""Of the engine's rows: what it is given work for before they are free. More would stand there in order of arrival, where no
tenant's share counts any more."""


class WaitingRoom:
    """The queue of one model.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, engine: EngineClient, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._limits, self._clock = engine, limits, clock
        self._admission = Admission(limits)
        self._queue: FairQueue[asyncio.Future[bool]] = FairQueue()
        self._tokens = 0
        self._called = 0
        """Requests whose turn has come, and which the engine does not know of yet."""
        self._rate = ServiceRate()
        self._draining = False
        self._empty = asyncio.Event()
        """Nothing waits here, and nothing is on its way to the engine."""
        self._empty.set()
        engine.listen(self._let_in)

    async def start(self) -> None:
        await self._engine.start()

    def listen(self, changed: Callable[[], None]) -> None:
        self._engine.listen(changed)

    @property
    def status(self) -> EngineStatus:
        status = self._engine.status
        return replace(
            status,
            waiting_requests=status.waiting_requests + len(self._queue),
            waiting_tokens=status.waiting_tokens + self._tokens,
        )

    @property
    def forecast(self) -> Forecast:
        """For a request of the call that is running now."""
        call = current_call.get(None)
        name, tenant = self._limits.tenant(call.tenant if call else "")
        ahead = self._queue.ahead_of(name, weight=tenant.weight, priority=call.priority if call else 0)
        wait = self._rate.wait(ahead + self._engine.status.waiting_requests) if ahead else 0.0
        return Forecast(wait=wait, seconds_each=self._rate.most_seconds_each, per_second=self._rate.per_second)

    def check(self) -> None:
        """Refuses what would be refused however small it is, before any work is done for it. Raises Refused."""
        call = current_call.get()
        tenant, _ = self._limits.tenant(call.tenant)
        self._admission.check(
            self.status,
            self.forecast,
            requests=1,
            tokens=0,
            seconds_left=call.seconds_left,
            tenant=tenant,
            waiting_of_tenant=self._queue.waiting_of(tenant),
        )

    @contextmanager
    def admit(self, requests: Sequence[Request]) -> Iterator[None]:
        """Until the running call has handed its requests over, which is the end of the block. Raises Refused."""
        call = current_call.get()
        tenant, _ = self._limits.tenant(call.tenant)
        with self._admission.admit(
            self.status,
            self.forecast,
            requests=len(requests),
            tokens=sum(len(request.input_ids) for request in requests),
            seconds_left=call.seconds_left,
            tenant=tenant,
            waiting_of_tenant=self._queue.waiting_of(tenant),
        ):
            yield

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        if self._draining or ((self._queue or not self._has_room) and not await self._turn(request)):
            yield SHUTTING_DOWN
            return
        if self._is_hopeless:
            self._let_in()
            yield TOO_LATE
            return
        began, counted = self._clock(), False
        try:
            async with aclosing(self._engine.submit(request)) as events:
                async for event in events:
                    if not counted and not isinstance(event, TokensReady):
                        counted = True
                        self._count_end(None if isinstance(event, Failed) else self._clock() - began)
                    yield event
        finally:
            if not counted:
                self._count_end(None)

    async def drain(self, timeout: float) -> None:
        self._draining = True
        deadline = self._clock() + timeout
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout)
        while self._queue:
            turn = self._queue.pop()
            if not turn.done():
                turn.set_result(False)
        await asyncio.sleep(0)  # those whose turn has just come hand over
        await self._engine.drain(max(0.0, deadline - self._clock()))

    @property
    def _has_room(self) -> bool:
        status = self._engine.status
        if not status.alive or not status.row_capacity:
            return True  # it says so itself, at once
        free = max(0, status.row_capacity - status.live_rows)
        rows_each = max(1.0, status.live_rows / max(1, status.live_requests))  # those that come are as those that are there
        return status.waiting_requests + self._called < max(1.0, (free + _LOOKAHEAD * status.row_capacity) / rows_each)

    @property
    def _is_hopeless(self) -> bool:
        """The running call's answer would come after its deadline: nothing is computed for it."""
        call = current_call.get(None)
        return call is not None and call.seconds_left < (self._rate.seconds_each or 0.0) and self.status.waiting_requests > 0

    async def _turn(self, request: Request) -> bool:
        """Waits for the request's turn; False when the server stops before."""
        call = current_call.get(None)
        name, tenant = self._limits.tenant(call.tenant if call else "")
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        ticket = self._queue.put(
            turn, tenant=name, weight=tenant.weight, priority=call.priority if call else 0, cost=_cost(request)
        )
        self._tokens += len(request.input_ids)
        self._empty.clear()
        try:
            come = await turn
        except asyncio.CancelledError:
            self._queue.remove(ticket)
            self._leave(request, called=not turn.cancelled() and turn.result())
            self._let_in()  # the turn may have come, and is the next one's then
            raise
        self._leave(request, called=come)
        return come

    def _leave(self, request: Request, *, called: bool) -> None:
        self._tokens -= len(request.input_ids)
        self._called -= called
        if not self._queue and not self._called:
            self._empty.set()

    def _let_in(self) -> None:
        """As many as there is room for, in their order."""
        while self._queue and self._has_room:
            turn = self._queue.pop()
            if not turn.done():  # cancelled, and its task has not run since
                self._called += 1
                turn.set_result(True)

    def _count_end(self, seconds: float | None) -> None:
        self._rate.ended(self._clock(), seconds, others_wait=bool(self._queue))
        self._let_in()


def _cost(request: Request) -> float:
    """Of serving it, in rows times tokens at most."""
    if isinstance(request, EncodingRequest):
        return len(request.input_ids)
    return request.decoding.rows * (len(request.input_ids) + request.decoding.max_tokens)
