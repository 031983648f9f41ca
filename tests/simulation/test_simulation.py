"""A few dozen lives, and faults planted in the real code, each of which some life must reveal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from server.batch import kv_cache, scheduler
from server.engines import in_flight
from server.waiting import waiting_room
from tests.simulation.virtual_time import Deadlock
from tests.simulation.world import live

LIVES = 40


def test_everything_holds_in_every_life() -> None:
    ends: Counter[str] = Counter()
    for seed in range(LIVES):
        ends.update(live(seed).ends)
    assert {"ok", "refused", "deadline", "cancelled", "engine", "shutting_down", "overloaded"} <= ends.keys()


def test_a_life_is_the_same_again() -> None:
    assert [live(seed).ends for seed in range(8)] == [live(seed).ends for seed in range(8)]


def _nothing(*args: object, **kwargs: object) -> None:
    return None


FAULTS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "a turn given back goes to nobody": (waiting_room.WaitingRoom, "_let_in", _nothing),
    "the rows of a request that has ended are kept": (waiting_room.WaitingRoom, "_release", lambda self, visit: self._let_in()),
    "a tenant takes rows beyond its own": (waiting_room.WaitingRoom, "_may_go", lambda self, visit: True),
    "an ended request still counts": (in_flight.InFlight, "_answered", _nothing),
    "who leaves is not cancelled in the engine": (scheduler.Scheduler, "remove", lambda self, request_id: True),
    "rows that end are not given back": (
        kv_cache.RowTable,
        "leave",
        lambda self, rows: kv_cache.Moves(rows[:0], rows[:0]),
    ),
    "a dead engine's requests are forgotten": (in_flight.InFlight, "fail_all", _nothing),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = FAULTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises((AssertionError, Deadlock, ValueError, KeyError, IndexError)):
        for seed in range(LIVES):
            live(seed)
