"""The books of what is under way: who listens hears of every change that lets others in."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from server.engines.in_flight import STOPPED, InFlight
from server.requests import Decoding, Event, GenerationRequest


async def test_who_listens_hears_when_everything_under_way_has_failed() -> None:
    books, heard = InFlight(), list[int]()
    books.alive = True
    books.listeners.append(lambda: heard.append(books.unanswered))

    async def run(name: str) -> list[Event]:
        request = GenerationRequest(id=name, input_ids=(5, 2), decoding=Decoding(max_tokens=5))
        async with aclosing(books.run(request, lambda _: None)) as events:
            return [event async for event in events]

    tasks = [asyncio.create_task(run(name)) for name in ("a", "b")]
    await asyncio.sleep(0)
    assert books.unanswered == 2
    books.fail_all(STOPPED)
    assert heard[-1:] == [0], "told when all have failed, not before"
    assert await asyncio.gather(*tasks) == [[STOPPED]] * 2
