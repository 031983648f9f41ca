"""Where one front end's requests enter the process that owns the engines, and its answers leave it."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, aclosing
from contextvars import copy_context
from dataclasses import replace
from functools import partial

from server.batch.engine import Addressed
from server.call import Call, current_call
from server.engines.in_flight import STOPPED
from server.engines.stepper import Request
from server.engines.wire import wrap_events
from server.front_ends.front_wire import Answers, Handover, Orders
from server.requests import Event, Failed, Failure
from server.waiting.admission import Refused
from server.waiting.room import Room

_log = logging.getLogger(__name__)


_Key = tuple[int, str]
"""Model, and the id that the front end gave the request: unique among those of one model."""


class Desk:
    """Puts requests into their rooms, in the name of the calls that they came from.

    Args:
        prefix: makes ids unique among front ends; two callers may choose the same one.
        rooms: in the order by which messages name models.
        send: takes messages to the front end.
    """

    def __init__(self, prefix: str, rooms: Sequence[Room], send: Callable[[Answers], None]) -> None:
        self._prefix, self._rooms, self._send = prefix, rooms, send
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[_Key, asyncio.Task[None]] = {}
        self._events: defaultdict[int, list[Addressed]] = defaultdict(list)
        """To be sent in one message, at the end of this turn of the event loop."""

    @property
    def in_hand(self) -> int:
        """Requests that have not been answered yet."""
        return len(self._tasks)

    def take(self, orders: Orders) -> None:
        for item in orders.items:
            if isinstance(item, Handover):
                self._begin(item)
            elif (task := self._tasks.get((item.model, item.request_id))) is not None:
                task.cancel()

    def close(self) -> None:
        """The front end is gone: nobody waits for what it had asked for."""
        for task in self._tasks.values():
            task.cancel()

    def _begin(self, handover: Handover) -> None:
        room = self._rooms[handover.model]
        requests = [item.request for item in handover.requests]
        call = Call(
            method="",
            request_id=handover.request_id,
            trace=handover.trace,
            tenant=handover.tenant,
            priority=handover.priority,
            started=handover.started,
            longest_seconds=handover.longest_seconds,
        )
        context = copy_context()
        context.run(current_call.set, call)
        admission = ExitStack()
        try:
            context.run(admission.enter_context, room.admit(requests))
        except Refused as refusal:
            for request in requests:
                key = handover.model, request.id
                self._answer(key, Failed(Failure.OVERLOADED, str(refusal), refusal.retry_after))
            return
        for request in requests:
            key = handover.model, request.id
            self._tasks[key] = task = self._loop.create_task(self._work(key, request), context=context.copy())
            task.add_done_callback(partial(self._forget, key))
        self._loop.call_soon(admission.close)  # after the first step of each task, which is when the room has the request

    async def _work(self, key: _Key, request: Request) -> None:
        room = self._rooms[key[0]]
        try:
            async with aclosing(room.submit(replace(request, id=self._prefix + request.id))) as events:
                async for event in events:
                    self._answer(key, event)
        except Exception:
            _log.exception("a request could not be worked on")
            self._answer(key, STOPPED)

    def _forget(self, key: _Key, task: asyncio.Task[None]) -> None:
        del self._tasks[key]

    def _answer(self, key: _Key, event: Event) -> None:
        if not self._events:
            self._loop.call_soon(self._flush)
        model, request_id = key
        self._events[model].append((request_id, event))

    def _flush(self) -> None:
        self._send(Answers({model: wrap_events(events) for model, events in self._events.items()}))
        self._events.clear()
