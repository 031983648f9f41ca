"""Whose turn it is, when there is more work than rows. Plain Python: no clock, no I/O.

Strict between priorities, fair between the tenants of one priority: start-time fair queueing (Goyal, Vin, Cheng 1996). The
first waiting item of each tenant has a start tag, the later of the virtual time and the end of the tenant's item that was
served before it; the smallest tag goes first. A tenant of weight 2 gets twice the work of one of weight 1 while both have items
waiting; one that was idle, or had to stand aside, has saved up nothing, and one whose items were removed unserved has lost
nothing.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """An item's place in the queue."""

    priority: int
    tenant: str
    number: int
    """Of arrival: the order of equals."""
    item: T
    work: float
    """Cost over weight."""
    waiting: bool = True


@dataclass(slots=True)
class _Line(Generic[T]):
    """What one tenant has waiting at one priority; never empty."""

    start: float
    """Tag of the first."""
    weight: float
    """The tenant's."""
    tickets: OrderedDict[int, Ticket[T]] = field(default_factory=OrderedDict)
    """By number."""

    @property
    def first(self) -> Ticket[T]:
        return next(iter(self.tickets.values()))


@dataclass(slots=True)
class _Lane(Generic[T]):
    """The tenants of one priority; never empty."""

    virtual_time: float = 0.0
    lines: dict[str, _Line[T]] = field(default_factory=dict)
    """Of the tenants that have something waiting. No tag is before the virtual time."""
    ends: dict[str, float] = field(default_factory=dict)
    """Of the last item of each of the others."""


class FairQueue(Generic[T]):
    """A queue of items of several tenants. A turn takes time in proportion to the tenants that wait."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane[T]] = {}
        self._length = 0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return self._length

    def waiting_of(self, tenant: str) -> int:
        """Items of one tenant, of any priority."""
        return sum(len(lane.lines[tenant].tickets) for lane in self._lanes.values() if tenant in lane.lines)

    def put(self, item: T, *, tenant: str = "", weight: float = 1.0, priority: int = 0, cost: float = 1.0) -> Ticket[T]:
        """Args: weight: the tenant's share; priority: larger goes first; cost: work of the item, in any unit."""
        lane = self._lanes.setdefault(priority, _Lane())
        if tenant not in lane.lines:
            lane.lines[tenant] = _Line(max(lane.virtual_time, lane.ends.pop(tenant, lane.virtual_time)), weight)
        ticket = Ticket(priority, tenant, next(self._numbers), item, cost / weight)
        lane.lines[tenant].tickets[ticket.number] = ticket
        self._length += 1
        return ticket

    def pop(self, may_go: Callable[[T], bool] = lambda item: True) -> T:
        """The item whose turn it is. A tenant whose first item may not go stands aside, with all that it has of that priority.

        Raises:
            IndexError: when there is none.
        """
        for _, lane in sorted(self._lanes.items(), reverse=True):
            aside = []
            for line in sorted(lane.lines.values(), key=lambda line: (line.start, line.first.number)):
                ticket = line.first
                if not may_go(ticket.item):
                    aside.append(line)
                    continue
                lane.virtual_time = line.start
                for other in aside:
                    other.start = lane.virtual_time
                line.start += ticket.work
                self._take(ticket)
                return ticket.item
        raise IndexError("nothing in the queue may go")

    def remove(self, ticket: Ticket[T]) -> bool:
        """Takes an item out before its turn; False when it was not (or no longer) there."""
        if not ticket.waiting:
            return False
        self._take(ticket)
        return True

    def ahead_of(self, tenant: str, *, weight: float = 1.0, priority: int = 0) -> int:
        """About how many items would have their turn before a new one: all that are more urgent, and in its own lane as many as
        the shares say, but never more than there are."""
        ahead = 0
        for urgency, lane in self._lanes.items():
            if urgency < priority:
                continue
            waiting = {name: len(line.tickets) for name, line in lane.lines.items()}
            if urgency > priority:
                ahead += sum(waiting.values())
            else:
                own = waiting.pop(tenant, 0)
                others = sum(min(count, (own + 1) * lane.lines[name].weight / weight) for name, count in waiting.items())
                ahead += own + round(others)
        return ahead

    def _take(self, ticket: Ticket[T]) -> None:
        lane = self._lanes[ticket.priority]
        line = lane.lines[ticket.tenant]
        ticket.waiting = False
        del line.tickets[ticket.number]
        self._length -= 1
        if not line.tickets:
            del lane.lines[ticket.tenant]
            lane.ends[ticket.tenant] = line.start
        if not lane.lines:  # begins anew: nobody owes anything
            del self._lanes[ticket.priority]
