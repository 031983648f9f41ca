from __future__ import annotations

import asyncio
from contextlib import aclosing, nullcontext

import pytest

from server.edge.fan_out import EngineBroken, RequestFailed, gather_results, merge_events
from server.requests import Encoded, EncodingRequest, Failed, Failure, Finished, TokensReady
from tests.server.fake_engine import FakeEngine, Request, hypothesis, says

REQUESTS = [EncodingRequest(id=f"r{i}", input_ids=(5 + i,)) for i in range(4)]
DONE = Finished((hypothesis((5,)),))


def numbered(request: Request) -> list[Encoded]:
    return [Encoded((), (float(request.input_ids[0]),))]


async def test_results_come_in_the_order_of_the_requests() -> None:
    gates = {request.id: asyncio.Event() for request in REQUESTS}
    engine = FakeEngine(lambda request: [gates[request.id], *numbered(request)])
    running = asyncio.create_task(gather_results(engine, REQUESTS, nullcontext()))
    for request in reversed(REQUESTS):
        await asyncio.sleep(0)
        gates[request.id].set()
    assert await running == [numbered(request)[0] for request in REQUESTS]
    assert engine.closed_early == []


async def test_requests_run_together() -> None:
    everyone, engine = asyncio.Event(), FakeEngine()
    engine.script = lambda request: [everyone, *numbered(request)]
    running = asyncio.create_task(gather_results(engine, REQUESTS, nullcontext()))
    await asyncio.sleep(0.01)
    assert engine.live == len(REQUESTS)
    everyone.set()
    await running


async def test_the_first_failure_cancels_the_rest() -> None:
    never = asyncio.Event()
    failed = Failed(Failure.NUMERICS, "not finite")
    engine = FakeEngine(lambda request: [failed] if request.id == "r2" else [never])
    with pytest.raises(RequestFailed) as failure:
        await gather_results(engine, REQUESTS, nullcontext())
    assert failure.value.failed is failed
    assert sorted(engine.closed_early) == ["r0", "r1", "r3"]
    assert engine.live == 0


async def test_a_refused_handover_submits_nothing() -> None:
    class Refusing(nullcontext[None]):
        def __enter__(self) -> None:
            raise LookupError("no")

    engine = FakeEngine()
    with pytest.raises(LookupError):
        await gather_results(engine, REQUESTS, Refusing())
    with pytest.raises(LookupError):
        await anext(merge_events(engine, REQUESTS, Refusing(), capacity=1))
    assert engine.submitted == []


async def test_the_engine_has_every_request_when_the_handover_ends() -> None:
    engine = FakeEngine(numbered)
    seen = []

    class Handover(nullcontext[None]):
        def __exit__(self, *excinfo: object) -> None:
            seen.append(len(engine.submitted))

    await gather_results(engine, REQUESTS, Handover())
    assert seen == [len(REQUESTS)]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], EngineBroken),
        ([TokensReady(0, (5,), (-1.0,))], EngineBroken),
        ([asyncio.CancelledError()], RequestFailed),
        ([ZeroDivisionError()], ZeroDivisionError),
    ],
)
async def test_whatever_an_engine_does_wrong_arrives_as_an_exception(steps: list[object], expected: type[Exception]) -> None:
    engine = FakeEngine(says(*steps))  # type: ignore[arg-type]
    async with asyncio.timeout(2):
        with pytest.raises(expected):
            await gather_results(engine, REQUESTS, nullcontext())
        with pytest.raises(expected):
            async for _ in merge_events(engine, REQUESTS, nullcontext(), capacity=4):
                pass


async def test_merged_events_keep_their_order_within_each_request() -> None:
    ready = [TokensReady(0, (token,), (-1.0,)) for token in (5, 6, 7)]
    engine = FakeEngine(says(*ready, DONE))
    events = [item async for item in merge_events(engine, REQUESTS[:2], nullcontext(), capacity=2)]
    for position in range(2):
        assert [event for at, event in events if at == position] == [*ready, DONE]


async def test_leaving_merged_events_early_cancels_what_runs() -> None:
    never = asyncio.Event()
    engine = FakeEngine(lambda request: [DONE] if request.id == "r0" else [never])
    async with aclosing(merge_events(engine, REQUESTS, nullcontext(), capacity=4)) as events:
        assert await anext(events) == (0, DONE)
    assert sorted(engine.closed_early) == ["r1", "r2", "r3"]


async def test_a_slow_reader_holds_the_engines_iterator_back() -> None:
    produced = 0

    def endless(request: Request):  # type: ignore[no-untyped-def]
        nonlocal produced
        while True:
            produced += 1
            yield TokensReady(0, (5,), (-1.0,))

    async with aclosing(merge_events(FakeEngine(endless), REQUESTS[:1], nullcontext(), capacity=8)) as events:
        await anext(events)
        await asyncio.sleep(0.02)
        assert produced <= 8 + 3
