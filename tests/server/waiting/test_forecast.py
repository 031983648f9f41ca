"""What a request can expect that comes to the waiting room, and who is refused for it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest

from server.waiting.admission import AdmissionLimits, Refused, Tenant
from server.waiting.waiting_room import TOO_LATE, WaitingRoom
from tests.server.waiting.rooms import DONE, Rows, call, collect, enter, leave, names, request, settle


@pytest.mark.parametrize(
    ("limits", "others", "refused"),
    [
        (AdmissionLimits(max_waiting_tokens=58), 29, False),  # 10 reach the engine, the others wait with 3 tokens each
        (AdmissionLimits(max_waiting_tokens=58), 30, True),
        (AdmissionLimits(max_waiting_requests=21), 28, False),  # 8 run
        (AdmissionLimits(max_waiting_requests=20), 28, True),
    ],
)
async def test_a_full_queue_refuses_before_any_work_is_done(limits: AdmissionLimits, others: int, refused: bool) -> None:
    room = WaitingRoom(Rows(8), limits)
    tasks = enter(room, *(f"r{n}" for n in range(others)))
    await settle()
    with call(), pytest.raises(Refused) if refused else nullcontext():
        room.check()
    await leave(tasks)


async def test_the_wait_of_a_tenant_with_few_rows_is_its_own() -> None:
    """Two rows, half a second each: of what the engine could do besides, this tenant gets nothing."""
    now = 0.0
    engine = Rows(100)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"batch": Tenant(max_rows=2)}), clock=lambda: now)
    tasks = enter(room, *(f"b{n}" for n in range(30)), tenant="batch")
    for first in range(0, 20, 2):
        await settle()
        now += 0.5
        engine.let_go(f"b{first}", f"b{first + 1}")
    await settle()
    with call("batch"):
        assert room.forecast().wait == pytest.approx(5 * 0.5, rel=0.2), "two have just begun, and eight are ahead"
        assert room.forecast().per_second == pytest.approx(4.0, rel=0.2)
        assert room.forecast(5).wait - room.forecast().wait == pytest.approx(4 / 4.0, rel=0.2), "four more ahead"
    with call(""):
        assert room.forecast().wait == 0.0
    await leave(tasks)


@pytest.mark.parametrize(("most", "per_second"), [(1, 2.0), (4, 8.0)])
async def test_a_tenant_can_expect_all_the_rows_that_it_may_hold(most: int, per_second: float) -> None:
    """It holds one; each takes half a second."""
    now = 0.0
    engine = Rows(4)
    limits = AdmissionLimits(tenants={"batch": Tenant(max_rows=most), "search": Tenant()})
    room = WaitingRoom(engine, limits, clock=lambda: now)
    tasks = enter(room, *(f"s{n}" for n in range(5)), tenant="search")
    await settle()
    tasks += enter(room, "b0", "b1", tenant="batch")
    await settle()
    now += 0.5
    engine.let_go("s0")
    await settle()
    assert names(engine)[5:] == ["b0"]
    with call("batch"):
        assert room.forecast().per_second == per_second
    await leave(tasks)


async def test_an_engine_without_rows_makes_nobody_wait() -> None:
    """It is being replaced, and says so itself."""
    now = 0.0
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    (first,) = enter(room, "first")
    await settle()
    now += 5.0
    engine.let_go("first")
    assert await first == [DONE]
    tasks = enter(room, "other")
    await settle()
    with call():
        assert room.forecast().wait == pytest.approx(5.0)
        engine.rows = 0
        assert room.forecast().wait == 0.0
    await leave(tasks)


async def test_where_one_row_serves_no_turn_comes_before_all_others_have_had_their_time() -> None:
    now = 0.0
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    tasks = enter(room, *(f"r{n}" for n in range(23)))
    for n in range(20):  # one a second
        await settle()
        now += 1.0
        engine.let_go(f"r{n}")
    await settle()
    with call():
        assert 3.0 <= room.forecast().wait < 5.0, "one has just begun, and two are ahead"
        now += 20.0
        assert room.forecast().wait == pytest.approx(2.0, rel=0.05), "late as that one is, two others are to be served"
    await leave(tasks)


async def test_a_call_that_would_be_late_is_refused_and_another_tenants_is_not() -> None:
    now = 0.0
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"a": Tenant(), "b": Tenant()}), clock=lambda: now)
    tasks = enter(room, *(f"a{n}" for n in range(40)), tenant="a")
    await settle()
    for n in range(20):  # one a second
        now += 1.0
        engine.let_go(f"a{n}")
        await settle()
    with call("a"):
        assert room.forecast().per_second == pytest.approx(1.0, rel=0.05)
    with call("a", seconds=10.0), pytest.raises(Refused, match="the answer would take about"), room.admit([request("x")]):
        pass
    with call("b", seconds=10.0), room.admit([request("x")]):
        pass
    await leave(tasks)


async def test_after_a_burst_nobodys_turn_comes_before_it_ends() -> None:
    now = 0.0
    engine = Rows(10)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    tasks = enter(room, *(f"r{n}" for n in range(40)))
    for wave in range(3):  # ten begin together, and end together after a second
        await settle()
        now += 1.0
        engine.let_go(*(f"r{n}" for n in range(10 * wave, 10 * wave + 10)))
    await settle()
    tasks += enter(room, *(f"s{n}" for n in range(6)))
    await settle()
    now += 0.1
    with call():
        forecast = room.forecast()
        assert forecast.per_second is not None
        assert 6 / forecast.per_second < 0.6, "six ahead, ten in a second"
        assert forecast.wait == pytest.approx(0.9), "but all have just begun"
    await leave(tasks)


async def test_who_goes_to_the_engine_before_rows_are_free_waits_there() -> None:
    """Eight rows, two more requests ahead: nobody is in the queue."""
    now = 0.0
    engine = Rows(8)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    tasks = enter(room, *(f"r{n}" for n in range(8)))
    await settle()
    now = 5.0
    engine.let_go(*(f"r{n}" for n in range(8)))
    await settle()
    waits = []
    for name in ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"):
        now += 0.1
        tasks += enter(room, name)
        await settle()
        with call():
            waits.append(room.forecast().wait)
    assert waits[:7] == [0.0] * 7
    assert waits[7:] == [pytest.approx(5.0 - 0.7), pytest.approx(5.0 - 0.7)], (
        "the first, and the second end 5 s after they began"
    )
    with call(seconds=10.0), pytest.raises(Refused), room.admit([request("x")]):
        pass
    with call(seconds=12.0), room.admit([request("x")]):
        pass
    await leave(tasks)


async def test_rows_are_free_for_as_many_as_have_room_in_them() -> None:
    now = 0.0
    engine = Rows(8, each=2)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    (first,) = enter(room, "first", beams=2)
    await settle()
    now += 5.0
    engine.let_go("first")
    assert await first == [DONE]
    tasks, waits = [], []
    for name in ("r0", "r1", "r2", "r3"):
        tasks += enter(room, name, beams=2)
        await settle()
        with call():
            waits.append(room.forecast().wait)
    assert waits == [0.0, 0.0, 0.0, pytest.approx(5.0)]
    await leave(tasks)


@pytest.mark.parametrize(("rows", "each", "wanting"), [(16, 1, 4), (8, 2, 1)])
async def test_each_of_those_in_the_engine_without_rows_needs_the_end_of_another(rows: int, each: int, wanting: int) -> None:
    now = 0.0
    engine = Rows(rows, each=each)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    with call():
        (first,) = enter(room, "first", beams=each)
        await settle()
        now += 20.0
        engine.let_go("first")
        assert await first == [DONE]
        tasks = []
        for n in range(rows // each + wanting):  # one a second, of which the last have no rows
            now += 1.0
            tasks += enter(room, f"r{n}", beams=each)
            await settle()
        began = now - wanting + 1 - rows // each
        assert room.forecast().wait == pytest.approx(began + wanting + 20.0 - now)
    await leave(tasks)


@pytest.mark.parametrize(("present", "measured"), [(10, True), (9, False)])
async def test_the_rate_is_measured_while_some_have_no_rows_though_the_queue_is_empty(present: int, measured: bool) -> None:
    """Eight rows. Of ten requests one still has none when another has ended; of nine, each has."""
    now = 0.0
    engine = Rows(8)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    tasks = enter(room, *(f"r{n}" for n in range(present)))
    for n in range(20):
        await settle()
        now += 1.0
        engine.let_go(f"r{n}")
        await settle()
        tasks += enter(room, f"r{present + n}")
    await settle()
    with call():
        assert room.forecast().per_second == (pytest.approx(1.0) if measured else None)
    await leave(tasks)


async def test_rows_that_are_too_few_for_one_as_wide_as_the_others_are_no_room() -> None:
    now = 0.0
    engine = Rows(13, each=8)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    tasks = enter(room, "r0", beams=8)
    await settle()
    with call():
        assert room.forecast().wait == 0.0, "nothing is known"
        now += 5.0
        engine.let_go("r0")
        assert await asyncio.gather(*tasks) == [[DONE]]
        tasks = enter(room, "r1", beams=8)
        await settle()
        assert room.forecast().wait == pytest.approx(5.0), "five rows are free"
    await leave(tasks)


@pytest.mark.parametrize(("live", "counts"), [(8, True), (7, True), (6, False), (1, False)])
async def test_what_a_request_takes_is_measured_where_most_rows_are_taken(live: int, counts: bool) -> None:
    """Whoever would have to wait may be refused, so a crowd need not have a queue. Of eight rows, six are three quarters."""
    now = 0.0
    engine = Rows(8)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    tasks = enter(room, *(f"r{n}" for n in range(9)))
    await settle()
    now = 4.0
    engine.let_go("r0")  # one has no rows yet
    await settle()
    engine.let_go(*(f"r{n}" for n in range(1, 9)))
    await asyncio.gather(*tasks)
    with call():
        assert room.forecast().seconds_each == pytest.approx(4.0)
    now = 10.0
    tasks = enter(room, *(f"s{n}" for n in range(live)))
    await settle()
    now = 11.0
    engine.let_go("s0")
    await settle()
    with call():
        assert (room.forecast().seconds_each != pytest.approx(4.0)) is counts
    await leave(tasks)


async def one_row_that_takes_three_seconds() -> tuple[Rows, WaitingRoom]:
    """As the first request has shown; from then on time stands still."""
    now = 0.0
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    (first,) = enter(room, "first")
    await settle()
    now += 3.0
    engine.let_go("first")
    assert await first == [DONE]
    return engine, room


async def test_an_answer_that_would_come_too_late_is_not_computed() -> None:
    engine, room = await one_row_that_takes_three_seconds()
    tasks = enter(room, "r0", "r1")
    with call(seconds=2.0):
        tasks.append(asyncio.create_task(collect(room, "hurried")))
    tasks += enter(room, "r2")
    await settle()
    for name in ("r0", "r1", "r2"):
        engine.let_go(name)
        await settle()
    assert await asyncio.gather(*tasks) == [[DONE], [DONE], [TOO_LATE], [DONE]]
    assert "hurried" not in names(engine)


async def test_little_time_is_left_to_the_engine_while_nothing_is_known() -> None:
    now = 0.0
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits(), clock=lambda: now)
    tasks = enter(room, "r0", "r1")
    with call(seconds=0.5):
        tasks.append(asyncio.create_task(collect(room, "hurried")))
    tasks += enter(room, "r2", "r3")
    await settle()
    now = 3.0
    for task in tasks[:2]:  # who leaves without an answer says nothing of how long one takes
        task.cancel()
    await settle()
    for name in ("hurried", "r2", "r3"):
        engine.let_go(name)
        await settle()
    assert await asyncio.gather(*tasks[2:]) == [[DONE]] * 3


async def test_little_time_may_be_enough_where_nobody_else_waits() -> None:
    engine, room = await one_row_that_takes_three_seconds()
    with call(seconds=2.0):
        hurried = asyncio.create_task(collect(room, "hurried"))
    await settle()
    engine.let_go("hurried")
    assert await hurried == [DONE]
