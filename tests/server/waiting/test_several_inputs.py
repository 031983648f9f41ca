"""A call of several inputs waits for the last of them."""

from __future__ import annotations

import pytest

from server.waiting.admission import AdmissionLimits, Refused, Tenant
from tests.server.waiting.rooms import Scene, call, request


async def test_a_call_waits_for_rows_for_the_last_of_its_inputs() -> None:
    """Four rows, five seconds each; one is taken."""
    async with Scene(4) as scene:
        await scene.enter("first")
        await scene.after(5.0, "first")
        await scene.enter("other")
        await scene.after(1.0)
        few, many = [[request(f"{count}.{n}") for n in range(count)] for count in (3, 4)]
        admit = scene.room.admit
        with call(seconds=5.5), admit(few):
            pass
        with call(seconds=10.0), pytest.raises(Refused, match="about 9 s"), admit(many):
            pass  # 4 s until one row more is free, and 5 s
        with call(seconds=12.0), admit(many):
            pass
        with call(seconds=10.0), admit(few), pytest.raises(Refused), admit([request("next")]):
            pass  # those that are on the way come first


async def test_a_call_of_more_inputs_than_its_tenant_may_hold_rows_waits_for_its_own() -> None:
    async with Scene(100, AdmissionLimits(tenants={"batch": Tenant(max_rows=2)})) as scene:
        await scene.enter("first", tenant="batch")
        await scene.after(5.0, "first")
        waits = [scene.forecast(inputs, "batch").wait for inputs in (1, 2, 3, 4)]
        assert waits == [0.0, 0.0, pytest.approx(2.5), pytest.approx(5.0)], "two in five seconds"
        with call(""), scene.room.admit([request(f"r{n}") for n in range(4)]):
            assert scene.forecast(4).wait == 0.0
            assert scene.forecast(2, "batch").wait == 0.0, "what others have on the way takes none of its rows"


async def test_who_comes_first_of_a_tenant_is_thought_as_wide_as_the_others_are() -> None:
    """Of four rows that it may hold, two requests of two take all."""
    async with Scene(100, AdmissionLimits(tenants={"batch": Tenant(max_rows=4)}), each=2) as scene:
        await scene.enter("first", "second", beams=2)
        await scene.after(5.0, "first")
        waits = [scene.forecast(inputs, "batch").wait for inputs in (2, 3)]
        assert waits == [0.0, pytest.approx(2.5)]
