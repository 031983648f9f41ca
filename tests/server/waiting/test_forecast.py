"""What a request can expect that comes to the waiting room, and who is refused for it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest

from server.waiting.admission import AdmissionLimits, Refused, Tenant
from server.waiting.waiting_room import TOO_LATE
from tests.server.waiting.rooms import DONE, Scene, call, names, request, settle


def numbered(letter: str, *span: int) -> list[str]:
    return [f"{letter}{n}" for n in range(*span)]


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
    async with Scene(8, limits) as scene:
        await scene.enter(*numbered("r", others))
        with call(), pytest.raises(Refused) if refused else nullcontext():
            scene.room.check()


async def test_the_wait_of_a_tenant_with_few_rows_is_its_own() -> None:
    """Two rows, half a second each: of what the engine could do besides, this tenant gets nothing."""
    async with Scene(100, AdmissionLimits(tenants={"batch": Tenant(max_rows=2)})) as scene:
        await scene.enter(*numbered("b", 30), tenant="batch")
        for first in range(0, 20, 2):
            await scene.after(0.5, *numbered("b", first, first + 2))
        one, five = scene.forecast(1, "batch"), scene.forecast(5, "batch")
        assert one.per_second == pytest.approx(4.0)
        assert one.wait == pytest.approx(9 / 4.0), "one of two that run ends first, then eight that are ahead"
        assert five.wait - one.wait == pytest.approx(4 / 4.0), "four more ahead"
        assert scene.forecast().wait == 0.0


@pytest.mark.parametrize(("most", "per_second"), [(1, 2.0), (4, 8.0)])
async def test_a_tenant_can_expect_all_the_rows_that_it_may_hold(most: int, per_second: float) -> None:
    """It holds one; each takes half a second."""
    async with Scene(4, AdmissionLimits(tenants={"batch": Tenant(max_rows=most), "search": Tenant()})) as scene:
        await scene.enter(*numbered("s", 5), tenant="search")
        await scene.enter("b0", "b1", tenant="batch")
        await scene.after(0.5, "s0")
        assert names(scene.engine)[5:] == ["b0"]
        assert scene.forecast(4, "batch").per_second == per_second


async def test_a_tenant_that_waits_for_the_engine_alone_waits_as_others_do() -> None:
    """It may hold ten rows, and holds none of the one there is."""
    async with Scene(1, AdmissionLimits(tenants={"batch": Tenant(max_rows=10), "search": Tenant()})) as scene:
        await scene.enter("first")
        await scene.after(5.0, "first")
        await scene.enter(*numbered("s", 3), tenant="search")
        await scene.enter("b0", tenant="batch")
        assert scene.forecast(1, "batch") == scene.forecast(1)


async def test_an_engine_without_rows_makes_nobody_wait() -> None:
    """It is being replaced, and says so itself."""
    async with Scene(1) as scene:
        await scene.enter("first")
        await scene.after(5.0, "first")
        await scene.enter("other")
        assert scene.forecast().wait == pytest.approx(5.0)
        scene.engine.rows = 0
        assert scene.forecast().wait == 0.0


async def test_where_one_row_serves_no_turn_comes_before_all_others_have_had_their_time() -> None:
    async with Scene(1) as scene:
        await scene.enter(*numbered("r", 23))
        for name in numbered("r", 20):
            await scene.after(1.0, name)
        assert 3.0 <= scene.forecast().wait < 5.0, "one has just begun, and two are ahead"
        await scene.after(20.0)
        assert scene.forecast().wait == pytest.approx(2.0, rel=0.05), "late as that one is, two others are to be served"


async def test_a_call_that_would_be_late_is_refused_and_another_tenants_is_not() -> None:
    async with Scene(1, AdmissionLimits(tenants={"a": Tenant(), "b": Tenant()})) as scene:
        await scene.enter(*numbered("a", 40), tenant="a")
        for name in numbered("a", 20):
            await scene.after(1.0, name)
        assert scene.forecast(1, "a").per_second == pytest.approx(1.0, rel=0.05)
        late = pytest.raises(Refused, match="the answer would take about")
        with call("a", seconds=10.0), late, scene.room.admit([request("x")]):
            pass
        with call("b", seconds=10.0), scene.room.admit([request("x")]):
            pass


async def test_after_a_burst_nobodys_turn_comes_before_it_ends() -> None:
    async with Scene(10) as scene:
        await scene.enter(*numbered("r", 40))
        for wave in range(0, 30, 10):  # ten begin together, and end together
            await scene.after(1.0, *numbered("r", wave, wave + 10))
        await scene.enter(*numbered("s", 6))
        await scene.after(0.1)
        forecast = scene.forecast()
        assert forecast.per_second is not None
        assert 6 / forecast.per_second < 0.6, "six ahead, ten in a second"
        assert forecast.wait == pytest.approx(0.9), "but all have just begun"


async def test_who_goes_to_the_engine_before_rows_are_free_waits_there() -> None:
    """Eight rows, two more requests ahead: nobody is in the queue."""
    async with Scene(8) as scene:
        await scene.enter(*numbered("r", 8))
        await scene.after(5.0, *numbered("r", 8))
        waits = []
        for name in numbered("s", 9):
            await scene.after(0.1)
            await scene.enter(name)
            waits.append(scene.forecast().wait)
        assert waits[:7] == [0.0] * 7
        assert waits[7:] == [pytest.approx(5.0 - 0.7)] * 2, "the first, and the second end 5 s after they began"
        with call(seconds=10.0), pytest.raises(Refused), scene.room.admit([request("x")]):
            pass
        with call(seconds=12.0), scene.room.admit([request("x")]):
            pass


async def test_rows_are_free_for_as_many_as_have_room_in_them() -> None:
    async with Scene(8, each=2) as scene:
        await scene.enter("first", beams=2)
        await scene.after(5.0, "first")
        waits = []
        for name in numbered("r", 4):
            await scene.enter(name, beams=2)
            waits.append(scene.forecast().wait)
        assert waits == [0.0, 0.0, 0.0, pytest.approx(5.0)]


@pytest.mark.parametrize(("rows", "each", "wanting"), [(16, 1, 4), (8, 2, 1)])
async def test_each_of_those_in_the_engine_without_rows_needs_the_end_of_another(rows: int, each: int, wanting: int) -> None:
    async with Scene(rows, each=each) as scene:
        await scene.enter("first", beams=each)
        await scene.after(20.0, "first")
        for name in numbered("r", rows // each + wanting):  # one a second, of which the last have no rows
            await scene.after(1.0)
            await scene.enter(name, beams=each)
        began = scene.now - wanting + 1 - rows // each
        assert scene.forecast().wait == pytest.approx(began + wanting + 20.0 - scene.now)


@pytest.mark.parametrize(("present", "measured"), [(10, True), (9, False)])
async def test_the_rate_is_measured_while_some_have_no_rows_though_the_queue_is_empty(present: int, measured: bool) -> None:
    """Eight rows. Of ten requests one still has none when another has ended; of nine, each has."""
    async with Scene(8) as scene:
        await scene.enter(*numbered("r", present))
        for n in range(20):
            await scene.after(1.0, f"r{n}")
            await scene.enter(f"r{present + n}")
        assert scene.forecast().per_second == (pytest.approx(1.0) if measured else None)


async def test_rows_that_are_too_few_for_one_as_wide_as_the_others_are_no_room() -> None:
    async with Scene(13, each=8) as scene:
        await scene.enter("r0", beams=8)
        assert scene.forecast().wait == 0.0, "nothing is known"
        await scene.after(5.0, "r0")
        await scene.enter("r1", beams=8)
        assert scene.forecast().wait == pytest.approx(5.0), "five rows are free"


@pytest.mark.parametrize(("live", "counts"), [(8, True), (7, True), (6, False), (1, False)])
async def test_what_a_request_takes_is_measured_where_most_rows_are_taken(live: int, counts: bool) -> None:
    """Whoever would have to wait may be refused, so a crowd need not have a queue. Of eight rows, six are three quarters."""
    async with Scene(8) as scene:
        await scene.enter(*numbered("r", 9))
        await scene.after(4.0, "r0")  # one has no rows yet
        await scene.after(0.0, *numbered("r", 1, 9))
        assert scene.forecast().seconds_each == pytest.approx(4.0)
        await scene.after(6.0)
        await scene.enter(*numbered("s", live))
        await scene.after(1.0, "s0")
        assert (scene.forecast().seconds_each != pytest.approx(4.0)) is counts


async def one_row_that_takes_three_seconds() -> Scene:
    """As the first request has shown."""
    scene = Scene(1)
    await scene.enter("first")
    await scene.after(3.0, "first")
    return scene


async def test_an_answer_that_would_come_too_late_is_not_computed() -> None:
    async with await one_row_that_takes_three_seconds() as scene:
        tasks = await scene.enter("r0", "r1")
        tasks += await scene.enter("hurried", seconds=2.0)
        tasks += await scene.enter("r2")
        for name in ("r0", "r1", "r2"):
            await scene.after(0.0, name)
        assert await asyncio.gather(*tasks) == [[DONE], [DONE], [TOO_LATE], [DONE]]
        assert "hurried" not in names(scene.engine)


async def test_little_time_is_left_to_the_engine_while_nothing_is_known() -> None:
    async with Scene(1) as scene:
        impatient = await scene.enter("r0", "r1")
        tasks = await scene.enter("hurried", seconds=0.5)
        tasks += await scene.enter("r2", "r3")
        await scene.after(3.0)
        for task in impatient:  # who leaves without an answer says nothing of how long one takes
            task.cancel()
        await settle()
        for name in ("hurried", "r2", "r3"):
            await scene.after(0.0, name)
        assert await asyncio.gather(*tasks) == [[DONE]] * 3


async def test_little_time_may_be_enough_where_nobody_else_waits() -> None:
    async with await one_row_that_takes_three_seconds() as scene:
        (hurried,) = await scene.enter("hurried", seconds=2.0)
        await scene.after(0.0, "hurried")
        assert await hurried == [DONE]
