"""Whose turn it is, when there is more work than rows. Plain Python: no clock, no I/O.

Strict between priorities, fair between the tenants of one priority: start-time fair queueing (Goyal, Vin, Cheng 1996). The
first waiting item of each tenant has a start tag, the later of the virtual time and the end of the tenant's item that was
served before it; the smallest tag goes first. A tenant of weight 2 gets twice the work of one of weight 1 while both have items
waiting; one that was idle, or had to stand aside, has saved up nothing, and one whose items were removed unserved has lost
nothing.
"""

from __future__ import annotations

import heapq
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
class _Lane(Generic[T]):
    """The tenants of one priority."""

    virtual_time: float = 0.0
    waiting: dict[str, OrderedDict[int, Ticket[T]]] = field(default_factory=dict)
    """Of each tenant that has any, by number."""
    ends: dict[str, float] = field(default_factory=dict)
    """Of each tenant's last item that was served, where that is after the virtual time."""
    heads: list[tuple[float, int, Ticket[T]]] = field(default_factory=list)
    """A heap: the start tag of each tenant's first item; those of items that were removed lie in it for a while."""
    tags: dict[str, float] = field(default_factory=dict)
    """The start tag of each tenant's first item."""

    def lead(self, tenant: str, tag: float) -> None:
        """The tenant's first item has this start tag."""
        ticket = next(iter(self.waiting[tenant].values()))
        self.tags[tenant] = tag
        heapq.heappush(self.heads, (tag, ticket.number, ticket))


class FairQueue(Generic[T]):
    """A queue of items of several tenants."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane[T]] = {}
        self._weights: dict[str, float] = {}
        self._length = 0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return self._length

    def waiting_of(self, tenant: str) -> int:
        """Items of one tenant, of any priority."""
        return sum(len(lane.waiting.get(tenant, ())) for lane in self._lanes.values())

    def put(self, item: T, *, tenant: str = "", weight: float = 1.0, priority: int = 0, cost: float = 1.0) -> Ticket[T]:
        """Args: weight: the tenant's share; priority: larger goes first; cost: work of the item, in any unit."""
        lane = self._lanes.setdefault(priority, _Lane())
        self._weights[tenant] = weight
        self._length += 1
        ticket = Ticket(priority, tenant, next(self._numbers), item, cost / weight)
        is_first = tenant not in lane.waiting
        lane.waiting.setdefault(tenant, OrderedDict())[ticket.number] = ticket
        if is_first:
            lane.lead(tenant, max(lane.virtual_time, lane.ends.pop(tenant, 0.0)))
        return ticket

    def pop(self, may_go: Callable[[T], bool] = lambda item: True) -> T:
        """The item whose turn it is. A tenant whose first item may not go stands aside, with all that it has of that priority.

        Raises:
            IndexError: when there is none.
        """
        for priority in sorted(self._lanes, reverse=True):
            lane = self._lanes[priority]
            aside = []
            ticket = None
            while lane.heads and ticket is None:
                head = heapq.heappop(lane.heads)
                if not head[2].waiting:
                    continue
                if may_go(head[2].item):
                    tag, _, ticket = head
                    lane.virtual_time = max(lane.virtual_time, tag)
                else:
                    aside.append(head)
            for tag, number, other in aside:
                later = tag if ticket is None else max(tag, lane.virtual_time)
                lane.tags[other.tenant] = later
                heapq.heappush(lane.heads, (later, number, other))
            if ticket is not None:
                self._take(lane, ticket, lane.tags[ticket.tenant] + ticket.work)
                return ticket.item
        raise IndexError("nothing in the queue may go")

    def remove(self, ticket: Ticket[T]) -> bool:
        """Takes an item out before its turn; False when it was not (or no longer) there."""
        if not ticket.waiting:
            return False
        lane = self._lanes[ticket.priority]
        self._take(lane, ticket, lane.tags[ticket.tenant])
        if len(lane.heads) > 64 and len(lane.heads) > 2 * len(lane.waiting):
            lane.heads = [head for head in lane.heads if head[2].waiting]
            heapq.heapify(lane.heads)
        return True

    def ahead_of(self, tenant: str, *, weight: float = 1.0, priority: int = 0) -> int:
        """About how many items would have their turn before a new one: all that are more urgent, and in its own lane as many as
        the shares say, but never more than there are."""
        ahead = 0
        for urgency, lane in self._lanes.items():
            if urgency > priority:
                ahead += sum(map(len, lane.waiting.values()))
            elif urgency == priority:
                own = len(lane.waiting.get(tenant, ()))
                others = sum(
                    min(len(items), (own + 1) * self._weights[name] / weight)
                    for name, items in lane.waiting.items()
                    if name != tenant
                )
                ahead += own + round(others)
        return ahead

    def _take(self, lane: _Lane[T], ticket: Ticket[T], next_tag: float) -> None:
        """Args: next_tag: start of the tenant's item behind this one, if this one was its first."""
        ticket.waiting = False
        self._length -= 1
        tenant, items = ticket.tenant, lane.waiting[ticket.tenant]
        was_first = next(iter(items)) == ticket.number
        del items[ticket.number]
        if items:
            if was_first:
                lane.lead(tenant, next_tag)
            return
        del lane.waiting[tenant], lane.tags[tenant]
        if next_tag > lane.virtual_time:
            lane.ends[tenant] = next_tag
        if not lane.waiting:  # begins anew: tags stay small, and tenants that are gone are forgotten
            del self._lanes[ticket.priority]
        if not self._length:
            self._weights.clear()
