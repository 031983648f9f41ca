"""The books of what is under way: who listens hears of every change that lets others in."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

from server.engines.in_flight import STOPPED, InFlight
from server.requests import Decoding, Event, Finished, GenerationRequest, TokensReady
from tests.server.fake_engine import hypothesis
from tests.server.step_stats import stats_of

DONE = Finished((hypothesis((5, 2)),))


def enter(books: InFlight, *names: str) -> list[asyncio.Task[list[Event]]]:
    async def run(name: str) -> list[Event]:
        request = GenerationRequest(id=name, input_ids=(5, 2), decoding=Decoding(max_tokens=5))
        async with aclosing(books.run(request, lambda _: None)) as events:
            return [event async for event in events]

    return [asyncio.create_task(run(name)) for name in names]


async def test_who_listens_hears_when_everything_under_way_has_failed() -> None:
    books, heard = InFlight(), list[int]()
    books.alive = True
    books.listeners.append(lambda joined: heard.append(books.unanswered))
    tasks = enter(books, "a", "b")
    await asyncio.sleep(0)
    assert books.unanswered == 2
    books.fail_all(STOPPED)
    assert heard[-1:] == [0], "told when all have failed, not before"
    assert await asyncio.gather(*tasks) == [[STOPPED]] * 2


async def test_who_listens_hears_of_every_step_when_it_is_in_the_books() -> None:
    books, heard = InFlight(), list[tuple[int, int]]()
    books.alive = True
    books.listeners.append(lambda joined: heard.append((books.unanswered, books.live_rows)))
    tasks = enter(books, "a", "b", "c")
    await asyncio.sleep(0)
    books.deliver([], stats_of(2))
    books.deliver([("a", DONE)], stats_of(2))
    books.deliver([("b", DONE), ("c", DONE)], stats_of(0))
    assert heard == [(3, 2), (2, 2), (0, 0)]
    assert await asyncio.gather(*tasks) == [[DONE]] * 3


async def test_what_the_engine_does_not_work_on_yet_waits_with_its_tokens() -> None:
    books = InFlight()
    books.alive = True
    tasks = enter(books, "a", "b")
    await asyncio.sleep(0)
    assert (books.waiting_requests, books.waiting_tokens) == (2, 4)
    books.deliver([], stats_of(1))
    assert (books.waiting_requests, books.waiting_tokens) == (1, 2)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    books.deliver([], stats_of(0))
    assert (books.unanswered, books.waiting_requests, books.waiting_tokens) == (1, 1, 2)
    books.fail_all(STOPPED)
    assert await tasks[1] == [STOPPED]
    assert (books.unanswered, books.waiting_requests, books.waiting_tokens) == (0, 0, 0)
    (last,) = enter(books, "c")
    await asyncio.sleep(0)
    assert books.waiting_tokens == 2, "nothing is left of those before"
    books.fail_all(STOPPED)
    assert await last == [STOPPED]


async def test_tokens_that_nobody_has_taken_yet_come_together_and_the_end_comes_last() -> None:
    books = InFlight()
    books.alive = True
    (task,) = enter(books, "a")
    await asyncio.sleep(0)
    tokens = [TokensReady(0, (5,), (-1.0,)), TokensReady(1, (7,), (-3.0,)), TokensReady(0, (6, 2), (-2.0, -0.5))]
    books.deliver([("a", tokens[0])], stats_of(1))
    await asyncio.sleep(0)  # the reader takes the first token
    books.deliver([("a", event) for event in tokens], stats_of(1), stats_of(1))
    books.deliver([("a", DONE)], stats_of(0))
    assert await task == [tokens[0], TokensReady(0, (5, 6, 2), (-1.0, -2.0, -0.5)), tokens[1], DONE]


async def test_of_several_steps_the_last_one_tells_what_lives_and_each_who_has_joined() -> None:
    books, heard = InFlight(), list[tuple[list[str], int]]()
    books.alive = True
    books.listeners.append(lambda joined: heard.append((list(joined), books.live_rows)))
    tasks = enter(books, "a", "b")
    await asyncio.sleep(0)
    books.deliver([], replace(stats_of(1), joined=("a",)), replace(stats_of(2), joined=("b",)))
    assert heard == [(["a", "b"], 2)]
    books.fail_all(STOPPED)
    await asyncio.gather(*tasks)


async def test_a_drain_of_nothing_takes_no_time() -> None:
    async with asyncio.timeout(0.5):
        await InFlight().drain(5)
