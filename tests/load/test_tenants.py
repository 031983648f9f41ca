"""The judgement of ``python -m tests.load.tenants``, and a short form of it that shows more than it measures."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.load.ledger import Percentiles
from tests.load.plan import Plan
from tests.load.running import server_process
from tests.load.stage import run_stage
from tests.load.sweep import probe_capacity
from tests.load.tenants import GREEDY, MODEST, Share, modest_and_greedy, problems_of, ratio


def share(p99: float, answered: float = 1.0) -> Share:
    return Share(answered=answered, seconds=Percentiles(p50=p99 / 4, p90=p99 / 2, p99=p99, highest=p99, count=100))


def test_others_who_wait_longer_or_in_vain_are_named() -> None:
    alone = [share(0.1), share(0.2), share(9.0)]
    assert ratio(alone, [share(0.2), share(0.3), share(0.25)]) == 1.25
    assert problems_of(alone, [share(0.2), share(0.3), share(0.25)]) == []
    assert problems_of(alone, [share(0.26, 0.9), share(0.26, 0.9), share(0.26, 0.9)]) == [
        "the others' p99 is 1.30 times what it is without the greedy tenant"
    ]
    assert problems_of(alone, [share(0.1, 0.89)] * 3) == ["the others got 89.0% of their calls answered"]


async def test_a_greedy_tenant_crowds_out_itself_alone(bundles: dict[str, Path]) -> None:
    tenants = [option for name in (*MODEST, f"{GREEDY}=1:8") for option in ("--tenant", name)]
    arguments = ("--device", "cpu", "--engines", "1", "--threads", "1", "--max-rows", "4", *tenants)
    async with server_process(bundles["encoder_decoder"], *arguments) as server:
        # One request fills the rows, so that far fewer calls are too many than would keep the front end from its work. How many
        # are too many is measured, for machines differ.
        plan = Plan(
            target=server.target, texts=["abc def"], seed=1, schedule=[], seconds=1.5, stream=False, deadline=20.0, beams=4
        )
        capacity = await asyncio.to_thread(probe_capacity, plan, run_stage, seconds=0.5)
        modest, greedy = await modest_and_greedy(plan, capacity, load=0.5, excess=8.0)
    assert greedy is not None
    assert modest.answered == 1.0
    assert greedy.answered < 1.0
    assert modest.seconds.p50 < greedy.seconds.p50
