"""An ``EngineClient`` in front of another: requests wait here for their turn, not in the engine.

The engine is given what it has rows for, and a little more so that rows never stand empty between two steps. What waits here
can still be put in a fair order, costs the engine nothing when its deadline passes, and is not lost with an engine's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from server.call import current_call
from server.engines.engine_client import Changed, EngineClient, EngineStatus
from server.engines.in_flight import SHUTTING_DOWN
from server.requests import EncodingRequest, Event, Failed, Failure, GenerationRequest, TokensReady
from server.waiting.admission import Admission, AdmissionLimits, Demand, Forecast, Tenant, Waiting
from server.waiting.fair_queue import FairQueue
from server.waiting.occupancy import Occupancy
from server.waiting.service_rate import ServiceRate

Request = GenerationRequest | EncodingRequest

TOO_LATE = Failed(Failure.OVERLOADED, "the server is busy: the answer would have come after the call's deadline")

_LOOKAHEAD = 0.25
"""Of the engine's rows: what it is given work for before they are free. More would stand there in order of arrival, where no
tenant's share counts any more."""

_CROWD = 0.75
"""Of the engine's rows: with more of them live, a request takes about as long as with all of them."""


@dataclass(slots=True, eq=False)
class _Visit:
    """A request on its way through the room."""

    request: Request
    tenant: str
    rows: int
    turn: asyncio.Future[bool]
    """Whether it may go to the engine; False when the server stops before."""


@dataclass(slots=True)
class _Use:
    """What one tenant has."""

    waiting_tokens: int = 0
    requests: int = 0
    """Whose turn has come, and which have not ended."""
    rows: int = 0
    """Of these."""


class WaitingRoom:
    """The queue of one model.

    Args:
        on_admitted: told the tokens of each input of a call that is let in.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        engine: EngineClient,
        limits: AdmissionLimits,
        on_admitted: Callable[[Sequence[int]], None] = lambda lengths: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._limits, self._on_admitted, self._clock = engine, limits, on_admitted, clock
        self._admission = Admission(limits)
        self._queue: FairQueue[_Visit] = FairQueue()
        self._use: defaultdict[str, _Use] = defaultdict(_Use)
        """By the name a tenant is counted under: one more than are configured, at most."""
        self._called = 0
        """Requests whose turn has come, and which the engine does not know of yet."""
        self._occupancy = Occupancy()
        """Of the engine, by those whose turn has come."""
        self._rows_reported = (0, 0)
        """Live after the step before the last one, and after the last."""
        self._rate = ServiceRate()
        self._draining = False
        self._empty = asyncio.Event()
        """Nothing waits here, and nothing is on its way to the engine."""
        self._empty.set()
        engine.listen(self._look)

    async def start(self) -> None:
        await self._engine.start()

    def listen(self, changed: Changed) -> None:
        self._engine.listen(changed)

    @property
    def status(self) -> EngineStatus:
        status = self._engine.status
        return replace(
            status,
            waiting_requests=status.waiting_requests + len(self._queue),
            waiting_tokens=status.waiting_tokens + sum(use.waiting_tokens for use in self._use.values()),
        )

    def forecast(self, requests: int = 1) -> Forecast:
        """For the last of so many requests of the call that is running now."""
        name, tenant, priority = self._caller
        ahead, per_second = self._queue.ahead_of(name, weight=tenant.weight, priority=priority), self._rate.per_second
        first = 0 if self._has_room else ahead  # with room, only their tenants' own bounds keep them
        wait = self._wait(first + self._admission.on_the_way + requests - 1)
        if tenant.max_rows is not None and self._rate.seconds_each:
            use, own = self._use[name], self._queue.waiting_of(name)
            rows_each = use.rows / use.requests if use.requests else self._rows_each
            at_once = max(1.0, tenant.max_rows / rows_each)
            own_ends = use.requests + own + self._admission.on_the_way_of(name) + requests - at_once
            if own_ends > 0:  # so many of its own must end before
                own_per_second = at_once / self._rate.seconds_each
                per_second = own_per_second if per_second is None else min(per_second, own_per_second)
                wait = max(wait, own_ends / per_second)
        return Forecast(wait=wait, seconds_each=self._rate.most_seconds_each, per_second=per_second)

    def check(self) -> None:
        """Refuses what would be refused however small it is, before any work is done for it. Raises Refused."""
        self._admission.check(*self._situation(requests=1, tokens=1))

    @contextmanager
    def admit(self, requests: Sequence[Request]) -> Iterator[None]:
        """Until the running call has handed its requests over, which is the end of the block. Raises Refused."""
        lengths = [len(request.input_ids) for request in requests]
        with self._admission.admit(*self._situation(requests=len(requests), tokens=sum(lengths))):
            self._on_admitted(lengths)
            yield

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        name, _, _ = self._caller
        visit = _Visit(request, name, _rows(request), asyncio.get_running_loop().create_future())
        if self._draining or not await self._turn(visit):
            yield SHUTTING_DOWN
            return
        if self._is_hopeless:
            self._release(visit)
            yield TOO_LATE
            return
        counted = False
        try:
            async with aclosing(self._engine.submit(request)) as events:
                async for event in events:
                    if not counted and not isinstance(event, TokensReady):
                        counted = True
                        self._count_end(visit, answered=not isinstance(event, Failed))
                    yield event
        finally:
            if not counted:
                self._count_end(visit, answered=False)

    async def drain(self, timeout: float) -> None:
        self._draining = True
        deadline = self._clock() + timeout
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout)
        while self._queue:
            turn = self._queue.pop().turn
            if not turn.done():
                turn.set_result(False)
        await self._engine.drain(max(0.0, deadline - self._clock()))

    @property
    def _caller(self) -> tuple[str, Tenant, int]:
        """Of the call that is running now: the name its tenant is counted under, the tenant, the priority."""
        call = current_call.get(None)
        return *self._limits.tenant(call.tenant if call else ""), call.priority if call else 0

    @property
    def _has_room(self) -> bool:
        status = self._engine.status
        if not status.alive or not status.row_capacity:
            return True  # it says so itself, at once
        return not self._occupancy.wanting or self._free_rows > -_LOOKAHEAD * status.row_capacity

    @property
    def _free_rows(self) -> int:
        """Left for others when all whose turn has come have theirs; less than none where these are too many."""
        status = self._engine.status
        return status.row_capacity - status.live_rows - self._occupancy.rows_wanted

    @property
    def _rows_each(self) -> float:
        """Of a request, on average: who comes is as those who are there."""
        status, occupancy = self._engine.status, self._occupancy
        requests, rows = status.live_requests + occupancy.wanting, status.live_rows + occupancy.rows_wanted
        return max(1.0, rows / max(1, requests))

    @property
    def _is_hopeless(self) -> bool:
        """The running call's answer would come after its deadline: nothing is computed for it."""
        call = current_call.get(None)
        return call is not None and call.seconds_left < (self._rate.seconds_each or 0.0) and self.status.waiting_requests > 0

    def _situation(self, *, requests: int, tokens: int) -> tuple[Demand, Waiting, Forecast]:
        """What the running call asks for, what it finds, and what the last of its requests can expect."""
        (name, _, _), status = self._caller, self.status
        demand = Demand(tenant=name, requests=requests, tokens=tokens, seconds_left=current_call.get().seconds_left)
        waiting = Waiting(
            requests=status.waiting_requests,
            tokens=status.waiting_tokens,
            own_requests=self._queue.waiting_of(name),
            own_tokens=self._use[name].waiting_tokens,
        )
        return demand, waiting, self.forecast(requests)

    def _wait(self, ahead: int) -> float:
        """Seconds until one has rows that has so many ahead of it in the queue; 0 when some are free, or nothing is known.

        By the rate, or by when those that have rows will have ended, whichever is later.
        """
        each = self._rate.seconds_each
        ends = math.ceil(ahead + 1 - self._free_rows / self._rows_each)
        if ends < 1 or not self._engine.status.row_capacity:
            return 0.0
        return max(self._rate.wait(ends - 1), self._occupancy.until_ended(ends, each, self._clock()) if each else 0.0)

    def _may_go(self, visit: _Visit) -> bool:
        """Its tenant may hold these rows too."""
        most, held = self._limits.tenant(visit.tenant)[1].max_rows, self._use[visit.tenant].rows
        return most is None or held == 0 or held + visit.rows <= most

    async def _turn(self, visit: _Visit) -> bool:
        """Waits for the request's turn, and holds its rows then; False when the server stops before."""
        use = self._use[visit.tenant]
        if not self._queue and self._has_room and self._may_go(visit):
            self._hold(visit)
            return True
        name, tenant, priority = self._caller
        ticket = self._queue.put(visit, tenant=name, weight=tenant.weight, priority=priority, cost=_cost(visit.request))
        use.waiting_tokens += len(visit.request.input_ids)
        self._empty.clear()
        self._let_in()  # those who wait may be there for their tenants' sake alone
        try:
            come = await visit.turn
        except asyncio.CancelledError:
            self._queue.remove(ticket)
            come = not visit.turn.cancelled() and visit.turn.result()
            if come:
                self._called -= 1
                self._release(visit)
            raise
        else:
            self._called -= come
            return come
        finally:
            use.waiting_tokens -= len(visit.request.input_ids)
            if not self._queue and not self._called:
                self._empty.set()

    def _hold(self, visit: _Visit) -> None:
        use = self._use[visit.tenant]
        use.requests += 1
        use.rows += visit.rows
        self._occupancy.enter(visit.request.id, visit.rows, self._clock())

    def _release(self, visit: _Visit) -> float | None:
        """What it held, or would have, is the next one's. Seconds for which the engine gave it rows; None if it never did."""
        use = self._use[visit.tenant]
        use.requests -= 1
        use.rows -= visit.rows
        seconds = self._occupancy.leave(visit.request.id, self._clock())
        self._let_in()
        return seconds

    def _look(self, joined: Sequence[str]) -> None:
        """The engine has reported."""
        self._rows_reported = self._rows_reported[1], self._engine.status.live_rows
        self._occupancy.joined(joined, self._clock())
        self._let_in()

    def _let_in(self) -> None:
        """As many as there is room for, in their order."""
        while self._queue and self._has_room:
            try:
                visit = self._queue.pop(self._may_go)
            except IndexError:
                return
            if not visit.turn.done():  # cancelled, and its task has not run since
                self._called += 1
                self._hold(visit)
                visit.turn.set_result(True)

    def _count_end(self, visit: _Visit, *, answered: bool) -> None:
        others_wait = bool(self._queue) or self._free_rows < 0
        crowd = others_wait or self._rows_reported[0] > _CROWD * self._engine.status.row_capacity
        seconds = self._release(visit)
        self._rate.ended(self._clock(), seconds if answered else None, others_wait=others_wait, crowd=crowd)


def _rows(request: Request) -> int:
    return 1 if isinstance(request, EncodingRequest) else request.decoding.rows


def _cost(request: Request) -> float:
    """Of serving it, in rows times tokens at most."""
    if isinstance(request, EncodingRequest):
        return len(request.input_ids)
    return request.decoding.rows * (len(request.input_ids) + request.decoding.max_tokens)
