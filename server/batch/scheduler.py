"""Who joins the running batch, and when. No clock, no I/O: the same calls give the same answers.

First come, first served. A request joins between any two decode steps, when there are rows for all of its hypotheses; how much
encoding or prefilling one step may do is bounded, so that joining requests cannot stall the streams of those that run. Where
several sources are encoded in less time together than one after the other, the first may wait a little for others.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from server.requests import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    request: GenerationRequest
    since: float
    """When it arrived, by the caller's clock."""


class Scheduler:
    """The queue in front of the running batch.

    Args:
        join_tokens: input tokens that may be encoded in one step; the first request of a step may exceed it alone.
    """

    def __init__(self, join_tokens: int) -> None:
        self.join_tokens = join_tokens
        self.waiting_tokens = 0
        self._queue: OrderedDict[str, Waiting] = OrderedDict()
        self._arrivals = deque[float](maxlen=8)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._queue.values())

    def add(self, request: GenerationRequest, now: float) -> None:
        self._queue[request.id] = Waiting(request=request, since=now)
        self._arrivals.append(now)
        self.waiting_tokens += len(request.input_ids)

    def remove(self, request_id: str) -> bool:
        """Takes a request out of the queue; False if it was not (or no longer) there."""
        waiting = self._queue.pop(request_id, None)
        if waiting is None:
            return False
        self.waiting_tokens -= len(waiting.request.input_ids)
        return True

    def gap(self, now: float) -> float:
        """Seconds between two arrivals, by the last few."""
        return (now - self._arrivals[0]) / len(self._arrivals) if self._arrivals else math.inf

    def schedule(self, free_rows: int, budget: int | None = None) -> list[Waiting]:
        """``fitting``, taken off the queue."""
        joining = self.fitting(free_rows, budget)
        for waiting in joining:
            self.remove(waiting.request.id)
        return joining

    def fitting(self, free_rows: int, budget: int | None = None) -> list[Waiting]:
        """The requests that can join now, in order of arrival.

        Args:
            budget: input tokens for this step, where some are spent already; ``join_tokens`` otherwise.
        """
        joining: list[Waiting] = []
        budget = self.join_tokens if budget is None else budget
        for waiting in self._queue.values():
            rows, tokens = waiting.request.decoding.rows, len(waiting.request.input_ids)
            if rows > free_rows or budget <= 0 or (joining and tokens > budget):
                break
            free_rows -= rows
            budget -= tokens
            joining.append(waiting)
        return joining


class Company:
    """Whether requests that can join should wait for others, to be encoded with them.

    An encoding costs a certain time however much it encodes, and holds up everybody who runs. So those who wait may, all
    together, wait as long as it would hold up the others, all together: at a steady rate the sum of both is then about the
    least (the economic order quantity, Harris 1913). Where arrivals are so rare that nobody is expected in that time, nobody
    waits.
    """

    def __init__(self) -> None:
        self._waited = 0.0
        self._count = 0
        self._since = 0.0

    @property
    def anyone(self) -> bool:
        """Whether somebody was waiting when it was asked last."""
        return self._count > 0

    def is_complete(self, count: int, now: float, held_up: float, gap: float) -> bool:
        """Asked before each step before which somebody waits, and once more when nobody does any longer.

        Args:
            count: requests that could join.
            held_up: seconds that others would lose by an encoding now, all together.
            gap: seconds until another request is expected.
        """
        self._waited += self._count * (now - self._since)
        self._count, self._since = count, now
        if count and max(self._waited, count * gap) < held_up:
            return False
        self._waited, self._count = 0.0, 0
        return True
