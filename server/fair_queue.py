"""Whose turn it is, when there is more work than rows. Plain Python: no clock, no I/O.

Strict between priorities, fair between the tenants of one priority: start-time fair queueing (Goyal, Vin, Cheng 1996). Each
item has a start tag, the later of the virtual time and the end of its tenant's item before it; the smallest tag goes first. A
tenant of weight 2 gets twice the work of one of weight 1 while both have items waiting; one that was idle has saved up nothing.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(order=True, slots=True)
class Ticket(Generic[T]):
    """An item's place in the queue."""

    urgency: int
    """Smaller goes first."""
    start: float
    number: int
    """Of arrival: the order of equals."""
    tenant: str = field(compare=False)
    item: T = field(compare=False)
    waiting: bool = field(compare=False, default=True)


@dataclass(slots=True)
class _Lane:
    """The tenants of one priority."""

    virtual_time: float = 0.0
    ends: dict[str, float] = field(default_factory=dict)
    """Of the last item of each tenant that has one waiting."""
    waiting: Counter[str] = field(default_factory=Counter)


class FairQueue(Generic[T]):
    """A queue of items of several tenants."""

    def __init__(self) -> None:
        self._heap: list[Ticket[T]] = []
        self._lanes: dict[int, _Lane] = {}
        self._weights: dict[str, float] = {}
        self._length = 0
        self._number = 0

    def __len__(self) -> int:
        return self._length

    def waiting_of(self, tenant: str) -> int:
        """Items of one tenant, of any priority."""
        return sum(lane.waiting[tenant] for lane in self._lanes.values())

    def put(self, item: T, *, tenant: str = "", weight: float = 1.0, priority: int = 0, cost: float = 1.0) -> Ticket[T]:
        """Args: weight: the tenant's share; priority: larger goes first; cost: work of the item, in any unit."""
        lane = self._lanes.setdefault(-priority, _Lane())
        start = max(lane.virtual_time, lane.ends.get(tenant, 0.0))
        lane.ends[tenant] = start + cost / weight
        lane.waiting[tenant] += 1
        self._weights[tenant] = weight
        self._number += 1
        self._length += 1
        ticket = Ticket(-priority, start, self._number, tenant, item)
        heapq.heappush(self._heap, ticket)
        return ticket

    def pop(self) -> T:
        """The item whose turn it is. Raises IndexError when there is none."""
        while True:
            ticket = heapq.heappop(self._heap)
            if ticket.waiting:
                self._lanes[ticket.urgency].virtual_time = ticket.start
                self._take(ticket)
                return ticket.item

    def remove(self, ticket: Ticket[T]) -> bool:
        """Takes an item out before its turn; False when it was not (or no longer) there."""
        if not ticket.waiting:
            return False
        self._take(ticket)
        if len(self._heap) > 64 and len(self._heap) > 2 * self._length:
            self._heap = [one for one in self._heap if one.waiting]
            heapq.heapify(self._heap)
        return True

    def ahead_of(self, tenant: str, *, weight: float = 1.0, priority: int = 0) -> int:
        """About how many items would have their turn before a new one: all that are more urgent, and in its own lane as many as
        the shares say, but never more than there are."""
        ahead = 0
        for urgency, lane in self._lanes.items():
            if urgency < -priority:
                ahead += lane.waiting.total()
            elif urgency == -priority:
                own = lane.waiting[tenant]
                others = sum(
                    min(count, (own + 1) * self._weights[name] / weight)
                    for name, count in lane.waiting.items()
                    if name != tenant
                )
                ahead += own + round(others)
        return ahead

    def _take(self, ticket: Ticket[T]) -> None:
        ticket.waiting = False
        self._length -= 1
        lane = self._lanes[ticket.urgency]
        lane.waiting[ticket.tenant] -= 1
        if not lane.waiting[ticket.tenant]:
            del lane.waiting[ticket.tenant]
            if lane.ends[ticket.tenant] <= lane.virtual_time:
                del lane.ends[ticket.tenant]
            if not lane.waiting:  # begins anew: tags stay small, and tenants that are gone are forgotten
                del self._lanes[ticket.urgency]
        if not self._length:
            self._heap.clear()
            self._weights.clear()
