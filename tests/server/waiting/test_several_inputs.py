"""A call of several inputs waits for the last of them."""

from __future__ import annotations

import pytest

from server.waiting.admission import AdmissionLimits, Refused, Tenant
from server.waiting.waiting_room import WaitingRoom
from tests.server.waiting.rooms import DONE, Rows, call, enter, leave, request, settle


async def test_a_call_waits_for_rows_for_the_last_of_its_inputs() -> None:
    """Four rows, five seconds each; one is taken."""
    now = 0.0
    engine = Rows(4)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    (first,) = enter(room, "first")
    await settle()
    now += 5.0
    engine.let_go("first")
    assert await first == [DONE]
    tasks = enter(room, "other")
    await settle()
    now += 1.0
    few, many = [[request(f"{count}.{n}") for n in range(count)] for count in (3, 4)]
    with call(seconds=5.5), room.admit(few):
        pass
    with call(seconds=10.0), pytest.raises(Refused, match="about 9 s"), room.admit(many):
        pass  # 4 s until one row more is free, and 5 s
    with call(seconds=12.0), room.admit(many):
        pass
    with call(seconds=10.0), room.admit(few), pytest.raises(Refused), room.admit([request("next")]):
        pass  # those that are on the way come first
    await leave(tasks)


async def test_a_call_of_more_inputs_than_its_tenant_may_hold_rows_waits_for_its_own() -> None:
    now = 0.0
    engine = Rows(100)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"batch": Tenant(max_rows=2)}), clock=lambda: now)
    (first,) = enter(room, "first", tenant="batch")
    await settle()
    now += 5.0
    engine.let_go("first")
    assert await first == [DONE]
    waits = []
    with call("batch"):
        waits += [room.forecast(inputs).wait for inputs in (1, 2, 3, 4)]
    assert waits == [0.0, 0.0, pytest.approx(2.5), pytest.approx(5.0)], "two in five seconds"
    with call(""), room.admit([request(f"r{n}") for n in range(4)]):
        assert room.forecast(4).wait == 0.0
        with call("batch"):
            assert room.forecast(2).wait == 0.0, "what others have on the way takes none of its rows"


async def test_who_comes_first_of_a_tenant_is_thought_as_wide_as_the_others_are() -> None:
    """Of four rows that it may hold, two requests of two take all."""
    now = 0.0
    engine = Rows(100, each=2)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"batch": Tenant(max_rows=4)}), clock=lambda: now)
    tasks = enter(room, "first", "second", beams=2)
    await settle()
    now += 5.0
    engine.let_go("first")
    await settle()
    with call("batch"):
        assert [room.forecast(inputs).wait for inputs in (2, 3)] == [0.0, pytest.approx(2.5)]
    await leave(tasks)
