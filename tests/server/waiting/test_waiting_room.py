"""Requests wait in front of the engine, in a fair order, and reach it only when it has room for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from server.engines.in_flight import NOT_RUNNING, SHUTTING_DOWN
from server.requests import Decoding, EncodingRequest, Event, Failed
from server.waiting.admission import AdmissionLimits, Refused, Tenant
from server.waiting.waiting_room import WaitingRoom
from tests.server.fake_engine import Request
from tests.server.waiting.rooms import DONE, Rows, call, collect, enter, leave, names, request, settle


async def test_the_engine_gets_what_it_has_rows_for_and_a_little_more() -> None:
    engine = Rows(8)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, *(f"r{n}" for n in range(30)))
    await settle()
    assert names(engine) == [f"r{n}" for n in range(10)], "8 rows, and a quarter of that ahead"
    assert (room.status.waiting_requests, room.status.waiting_tokens) == (22, 60)
    engine.let_go("r3", "r4", "r5")
    await settle()
    assert names(engine)[10:] == ["r10", "r11", "r12"]
    while engine.gates:
        engine.let_go(*list(engine.gates))
        await settle()
    assert await asyncio.gather(*tasks) == [[DONE]] * 30
    assert (room.status.waiting_requests, room.status.waiting_tokens, engine.live) == (0, 0, 0)


async def test_wide_requests_are_not_piled_up_in_the_engine_where_no_share_counts() -> None:
    engine = Rows(16, each=4)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, *(f"r{n}" for n in range(10)), beams=4)
    await settle()
    assert names(engine) == [f"r{n}" for n in range(5)], "four at once, and a quarter of the rows ahead is one more"
    for n in range(10):
        engine.let_go(f"r{n}")
        await settle()
    assert await asyncio.gather(*tasks) == [[DONE]] * 10


async def test_a_tenant_holds_no_more_rows_than_it_may() -> None:
    engine = Rows(8)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"batch": Tenant(max_rows=2), "search": Tenant()}))
    tasks = enter(room, "b0", "b1", "b2", "b3", tenant="batch")
    await settle()
    assert names(engine) == ["b0", "b1"], "though there are eight rows"
    tasks += enter(room, "s0", "s1", tenant="search")
    await settle()
    assert names(engine)[2:] == ["s0", "s1"], "those who wait for rows of their own are in nobody's way"
    engine.let_go("s0")
    await settle()
    assert len(engine.submitted) == 4, "a row that others give back is not the tenant's"
    tasks.pop(2).cancel()  # b2 leaves the queue
    engine.let_go("b0")
    await settle()
    assert names(engine)[4:] == ["b3"]
    engine.let_go("b1", "b3", "s1")
    assert await asyncio.gather(*tasks) == [[DONE]] * 5


async def test_a_request_wider_than_its_tenants_rows_goes_alone() -> None:
    engine = Rows(8, each=4)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"batch": Tenant(max_rows=2)}))
    with call("batch"):
        tasks = [asyncio.create_task(collect(room, name, beams=4)) for name in ("b0", "b1")]
    await settle()
    assert names(engine) == ["b0"]
    engine.let_go("b0")
    await settle()
    engine.let_go("b1")
    assert await asyncio.gather(*tasks) == [[DONE]] * 2


async def test_who_would_fit_does_not_overtake_others_of_its_tenant() -> None:
    engine = Rows(16)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"batch": Tenant(max_rows=4)}))
    tasks = []
    with call("batch"):
        for name, beams in [("b0", 2), ("wide", 4), ("narrow", 1)]:
            tasks.append(asyncio.create_task(collect(room, name, beams)))
            await settle()
    assert names(engine) == ["b0"]
    for name in ("b0", "wide", "narrow"):
        engine.let_go(name)
        await settle()
    assert names(engine) == ["b0", "wide", "narrow"]
    assert await asyncio.gather(*tasks) == [[DONE]] * 3


async def test_a_text_that_is_only_read_takes_one_row() -> None:
    engine = Rows(8)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"batch": Tenant(max_rows=2)}))

    async def read(name: str) -> list[Event]:
        async with aclosing(room.submit(EncodingRequest(id=name, input_ids=(5, 2)))) as events:
            return [event async for event in events]

    with call("batch"):
        tasks = [asyncio.create_task(read(name)) for name in ("e0", "e1", "e2")]
    await settle()
    assert names(engine) == ["e0", "e1"]
    await leave(tasks)


async def test_what_the_engine_has_not_said_yet_counts_with_its_width() -> None:
    class Late(Rows):
        """Has reported its first request alone."""

        def _report(self) -> None:
            if len(self.present) == 1:
                super()._report()

    engine = Late(16, each=4)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, *(f"r{n}" for n in range(20)), beams=4)
    await settle()
    assert len(engine.submitted) == 1 + (12 + 4) // 4
    await leave(tasks)


async def test_rows_that_are_free_with_a_later_report_are_given_then() -> None:
    class Stepping(Rows):
        stepping = True

        def _report(self) -> None:
            if self.stepping:
                super()._report()

    engine = Stepping(8)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, *(f"r{n}" for n in range(12)))
    await settle()
    assert len(engine.submitted) == 10
    engine.stepping = False
    tasks[0].cancel()
    await settle()
    assert len(engine.submitted) == 10, "the engine still counts its row"
    engine.stepping = True
    engine._report()
    await settle()
    assert names(engine)[10:] == ["r10"]
    await leave(tasks)


async def test_who_leaves_while_waiting_never_reaches_the_engine() -> None:
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, "first", "ahead", "left", "last")
    await settle()
    tasks[2].cancel()
    await settle()
    assert tasks[2].cancelled()
    assert (room.status.waiting_requests, room.status.waiting_tokens) == (2, 3), "last, and ahead in the engine"
    for name in ("first", "ahead", "last"):
        engine.let_go(name)
        await settle()
    assert names(engine) == ["first", "ahead", "last"]


async def test_who_leaves_just_as_the_turn_comes_gives_it_to_the_next() -> None:
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, "first", "ahead", "left", "last")
    await settle()
    engine.let_go("first")
    while room.status.waiting_tokens == 6 and not room._called:
        await asyncio.sleep(0)
    tasks[2].cancel()  # its turn has come, and it has not heard yet
    await settle()
    assert names(engine) == ["first", "ahead", "last"]
    engine.let_go("ahead", "last")
    await asyncio.gather(*tasks, return_exceptions=True)
    more = enter(room, "r0", "r1", "r2", "r3")
    await settle()
    assert names(engine)[3:] == ["r0", "r1"], "no more than ever"
    for name in ("r0", "r1", "r2", "r3"):
        engine.let_go(name)
        await settle()
    assert await asyncio.gather(*more) == [[DONE]] * 4
    async with asyncio.timeout(0.5):
        await room.drain(5)


async def test_tenants_take_turns_and_urgent_calls_go_first() -> None:
    engine = Rows(4)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"a": Tenant(), "b": Tenant()}))
    tasks = enter(room, *(f"a{n}" for n in range(20)), tenant="a")
    await settle()
    tasks += enter(room, "b0", "b1", tenant="b")
    tasks += enter(room, "urgent", tenant="a", priority=1)
    await settle()
    engine.let_go("a0", "a1", "a2", "a3", "a4")
    await settle()
    assert names(engine)[5:] == ["urgent", "a5", "b0", "a6", "b1"]
    await leave(tasks)


async def test_what_is_asked_outside_of_a_call_is_not_urgent() -> None:
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, "first", "ahead", "called")
    await settle()
    tasks.append(asyncio.create_task(collect(room, "uncalled")))
    await settle()
    for name in ("first", "ahead", "called", "uncalled"):
        engine.let_go(name)
        await settle()
    assert names(engine) == ["first", "ahead", "called", "uncalled"]
    assert await asyncio.gather(*tasks) == [[DONE]] * 4


async def turns(make: Callable[[str, int], Request], long: int, short: int, each: int) -> list[str]:
    """Who comes when, where one row serves two tenants with ``each`` requests of so many tokens."""
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits(tenants={"long": Tenant(), "short": Tenant()}))
    tasks = enter(room, "r0", "r1")
    await settle()

    async def ask(name: str, tokens: int) -> list[Event]:
        async with aclosing(room.submit(make(name, tokens))) as events:
            return [event async for event in events]

    for tenant, tokens in [("long", long), ("short", short)]:
        with call(tenant):
            tasks += [asyncio.create_task(ask(f"{tenant}{n}", tokens)) for n in range(each)]
    await settle()
    while engine.gates:
        engine.let_go(*list(engine.gates))
        await settle()
    assert await asyncio.gather(*tasks) == [[DONE]] * (2 + 2 * each)
    return names(engine)[2:]


async def test_texts_that_are_only_read_cost_their_tenant_their_length() -> None:
    order = await turns(lambda name, tokens: EncodingRequest(id=name, input_ids=(5,) * tokens), long=30, short=10, each=4)
    assert order == ["long0", "short0", "short1", "short2", "long1", "short3", "long2", "long3"]


async def test_texts_that_are_written_cost_their_tenant_input_and_output() -> None:
    """3 and 29 tokens against 3 and 5: four turns for one."""
    order = await turns(
        lambda name, tokens: replace(request(name), decoding=Decoding(max_tokens=tokens)), long=29, short=5, each=5
    )
    assert order[:7] == ["long0", "short0", "short1", "short2", "short3", "long1", "short4"]


async def test_who_listens_hears_of_the_engine() -> None:
    engine, heard = Rows(1), list[str]()
    room = WaitingRoom(engine, AdmissionLimits())
    room.listen(heard.extend)
    for changed in engine.listeners:
        changed(["r0"])
    assert heard == ["r0"]


async def test_what_waits_ends_with_the_engine() -> None:
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, "r0", "r1", "r2", "r3")
    await settle()
    engine.alive = False
    engine.let_go("r0", "r1")
    await settle()
    engine.let_go("r2", "r3")
    assert await asyncio.gather(*tasks) == [[NOT_RUNNING]] * 4


async def test_a_drain_serves_what_waits_and_takes_nothing_new() -> None:
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits())
    every = ("r0", "r1", "r2", "r3", "r4")
    tasks = enter(room, *every)
    await settle()
    drain = asyncio.create_task(room.drain(5))
    await settle()
    assert await collect(room, "late") == [SHUTTING_DOWN]
    for name in every:
        engine.let_go(name)
        await settle()
    assert await asyncio.gather(*tasks) == [[DONE]] * 5
    async with asyncio.timeout(0.5):
        await drain
    assert len(engine.drains) == 1


async def test_a_drain_of_nothing_takes_no_time() -> None:
    async with asyncio.timeout(0.5):
        await WaitingRoom(Rows(1), AdmissionLimits()).drain(5)


async def test_a_drain_out_of_time_tells_those_who_wait() -> None:
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, "r0", "r1", "r2", "r3")
    await settle()
    with pytest.raises(TimeoutError):  # the engine's own drain, which this one does not take calmly
        await room.drain(0.05)
    assert engine.drains == [0.0]
    assert [tasks[n].result() for n in (2, 3)] == [[SHUTTING_DOWN]] * 2
    engine.let_go("r0", "r1")
    assert await asyncio.gather(*tasks[:2]) == [[DONE]] * 2
    assert all(not isinstance(event, Failed) for task in tasks[:2] for event in task.result())


async def test_told_is_what_is_let_in_and_not_what_is_refused() -> None:
    told: list[list[int]] = []
    room = WaitingRoom(Rows(8), AdmissionLimits(max_waiting_requests=2), on_admitted=lambda lengths: told.append(list(lengths)))
    two, three = [[request(f"{count}.{n}") for n in range(count)] for count in (2, 3)]
    with call(), room.admit(two), pytest.raises(Refused), room.admit(three):
        pass
    assert told == [[3, 3]]


async def test_nobody_waits_for_the_rows_of_an_engine_that_is_gone() -> None:
    engine = Rows(1)
    room = WaitingRoom(engine, AdmissionLimits())
    tasks = enter(room, "r0", "r1", "r2")
    await settle()
    assert names(engine) == ["r0", "r1"]
    engine.alive = False
    tasks += enter(room, "late")
    await settle()
    assert {*names(engine)} == {"r0", "r1", "r2", "late"}, "it says so itself, at once"
    await leave(tasks)
