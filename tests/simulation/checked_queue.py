"""The real queue beside a plain list of what it must hold: each turn is checked against what fairness means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from server.waiting.fair_queue import FairQueue, Ticket

T = TypeVar("T")


@dataclass(slots=True)
class _Item:
    number: int
    tenant: str
    priority: int
    weight: float
    cost: float


class CheckedQueue(FairQueue[T]):
    """Raises AssertionError at the turn that is not fair.

    Between tenants of one priority that both have items waiting all the time, and need not stand aside, what they are given,
    each divided by its weight, differs by no more than one item of each (Goyal, Vin, Cheng 1996, theorem 1).
    """

    def __init__(self) -> None:
        super().__init__()
        self._model: dict[int, tuple[Ticket[T], _Item]] = {}
        self._arrived = 0
        self._given: dict[tuple[int, str, str], float] = {}
        """By priority and two tenants: what the first was given more than the second while both had items waiting."""
        self._largest: dict[tuple[int, str], float] = {}
        """Cost over weight of a tenant's largest item."""
        self._aside: set[tuple[int, str]] = set()
        """Priority and tenant of those whose first item may not go now."""

    def put(self, item: T, *, tenant: str = "", weight: float = 1.0, priority: int = 0, cost: float = 1.0) -> Ticket[T]:
        waiting = self._tenants(priority)
        ticket = super().put(item, tenant=tenant, weight=weight, priority=priority, cost=cost)
        self._arrived += 1
        self._model[id(ticket)] = ticket, _Item(self._arrived, tenant, priority, weight, cost)
        self._largest[priority, tenant] = max(self._largest.get((priority, tenant), 0.0), cost / weight)
        if tenant not in waiting:  # nobody has been given more than it until now
            for other in waiting:
                self._given[priority, tenant, other] = self._given[priority, other, tenant] = 0.0
        self._agree()
        return ticket

    def pop(self, may_go: Callable[[T], bool] = lambda item: True) -> T:
        before = set(self._model)
        firsts: dict[tuple[int, str], Ticket[T]] = {}
        for ticket, one in sorted(self._model.values(), key=lambda pair: pair[1].number):
            firsts.setdefault((one.priority, one.tenant), ticket)
        self._aside = {key for key, ticket in firsts.items() if not may_go(ticket.item)}
        try:
            item = super().pop(may_go)
        except IndexError:
            assert self._aside == set(firsts), "something that may go is kept waiting"
            raise
        for aside in self._aside:  # from here on they are as if they had just come
            for key in self._pairs(*aside):
                self._given[key] = 0.0
        (gone,) = [key for key in before if not self._model[key][0].waiting]
        assert self._model[gone][0].item is item, "an item's turn came with another's ticket"
        self._check_turn(self._forget(self._model.pop(gone)[1]))
        self._agree()
        return item

    def remove(self, ticket: Ticket[T]) -> bool:
        was_there = id(ticket) in self._model
        removed = super().remove(ticket)
        assert removed is was_there, "an item that waits is there, and no other is"
        if removed:
            self._forget(self._model.pop(id(ticket))[1])
        self._agree()
        return removed

    def ahead_of(self, tenant: str, *, weight: float = 1.0, priority: int = 0) -> int:
        ahead = super().ahead_of(tenant, weight=weight, priority=priority)
        items = [item for _, item in self._model.values()]
        certain = sum(one.priority > priority or (one.priority == priority and one.tenant == tenant) for one in items)
        possible = sum(one.priority >= priority for one in items)
        assert certain <= ahead <= possible, f"{ahead} are said to be ahead, where {certain} to {possible} can be"
        return ahead

    def _tenants(self, priority: int) -> set[str]:
        return {item.tenant for _, item in self._model.values() if item.priority == priority}

    def _forget(self, item: _Item) -> _Item:
        """Its tenant may have nothing waiting any more."""
        if item.tenant not in self._tenants(item.priority):
            for key in self._pairs(item.priority, item.tenant):
                del self._given[key]
        return item

    def _pairs(self, priority: int, tenant: str) -> list[tuple[int, str, str]]:
        return [key for key in self._given if key[0] == priority and tenant in key[1:]]

    def _check_turn(self, turn: _Item) -> None:
        rest = [item for _, item in self._model.values()]
        urgent = {(item.priority, item.tenant) for item in rest if item.priority > turn.priority}
        assert urgent <= self._aside, "something more urgent waits"
        assert (turn.priority, turn.tenant) not in self._aside, "an item goes that may not"
        own = [item.number for item in rest if (item.tenant, item.priority) == (turn.tenant, turn.priority)]
        assert all(number > turn.number for number in own), "a tenant's items change their order"
        for other in self._tenants(turn.priority) - {turn.tenant}:
            if (turn.priority, turn.tenant, other) not in self._given:
                continue
            self._given[turn.priority, turn.tenant, other] += turn.cost / turn.weight
            self._given[turn.priority, other, turn.tenant] -= turn.cost / turn.weight
            most = self._largest[turn.priority, turn.tenant] + self._largest[turn.priority, other]
            more = self._given[turn.priority, turn.tenant, other]
            assert more <= most + 1e-6, f"{turn.tenant} was given {more:.3g} more than {other}, where {most:.3g} is fair"

    def _agree(self) -> None:
        assert len(self) == len(self._model), "the queue has lost count"
        for tenant, count in Counter(item.tenant for _, item in self._model.values()).items():
            assert self.waiting_of(tenant) == count, "the queue has lost count of a tenant"
