"""An engine in a thread: every request gets its own events and exactly one last one, whatever happens around it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from model import decode as reference
from server.batch.engine import Addressed, Engine
from server.batch.sequence_model import SequenceShape
from server.batch.step_stats import StepStats
from server.device.runtime import SequenceRuntime
from server.device.session import RuntimeUnavailable, SessionSettings
from server.engines.in_process import InProcessEngine
from server.requests import Decoding, Event, Failed, Failure, Finished, GenerationRequest, TokensReady
from tests import tiny
from tests.server.step_stats import stats_of

SHUTTING_DOWN = Failed(Failure.SHUTTING_DOWN, "the server is shutting down")
DIED = Failed(Failure.ENGINE, "the engine stopped while it worked on this request")


def request(name: str, tokens: int = 3) -> GenerationRequest:
    return GenerationRequest(id=name, input_ids=(5, 6, 7), decoding=Decoding(max_tokens=tokens))


class Countdown:
    """An engine whose requests each get the tokens max_tokens - 1, ..., 0, one a step."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.cancelled: list[str] = []
        self.threads: set[int] = set()
        self.may_step = threading.Event()
        self.may_step.set()
        self.broken = False

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def submit(self, request: GenerationRequest) -> None:
        self.threads.add(threading.get_ident())
        self.left[request.id] = request.decoding.max_tokens

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.left.pop(request_id, None)

    def step(self) -> tuple[list[Addressed], StepStats]:
        assert self.may_step.wait(10)
        if self.broken:
            raise RuntimeError("secret internals")
        self.left = {name: n - 1 for name, n in self.left.items()}
        events: list[Addressed] = [(name, TokensReady(0, (n,), (-0.5,))) for name, n in self.left.items()]
        events += [(name, Finished(())) for name, n in self.left.items() if n == 0]
        self.left = {name: n for name, n in self.left.items() if n}
        return events, stats_of(len(self.left))


def streamed(events: list[Event]) -> list[int]:
    """The tokens, however many came at a time."""
    return [token for event in events if isinstance(event, TokensReady) for token in event.tokens]


async def collect(engine: InProcessEngine, request: GenerationRequest) -> list[Event]:
    async with asyncio.timeout(20):
        return [event async for event in engine.submit(request)]


@asynccontextmanager
async def running(stepper: object, on_step: Callable[[StepStats], None] = lambda stats: None) -> AsyncIterator[InProcessEngine]:
    engine = InProcessEngine("tiny", lambda: stepper, on_step)  # type: ignore[arg-type,return-value]
    await engine.start()
    try:
        yield engine
    finally:
        await engine.drain(0)
        assert not engine.status.alive
        assert not [thread for thread in threading.enumerate() if thread.name == "engine tiny"]


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_every_request_gets_its_own_events_and_one_last_one() -> None:
    stepper, seen = Countdown(), list[StepStats]()
    async with running(stepper, seen.append) as engine:
        rng = random.Random(0)
        lengths = {f"r{i}": rng.randint(1, 12) for i in range(300)}
        results = await asyncio.gather(*(collect(engine, request(name, n)) for name, n in lengths.items()))
        for events, length in zip(results, lengths.values(), strict=True):
            assert streamed(events) == list(range(length - 1, -1, -1))
            assert events[-1] == Finished(())
            assert sum(not isinstance(event, TokensReady) for event in events) == 1
        assert stepper.cancelled == []
        assert len(stepper.threads) == 1
        assert stepper.threads != {threading.get_ident()}
        assert len(seen) >= 12
        assert engine.status.waiting_requests == engine.status.waiting_tokens == engine.status.live_rows == 0


async def test_real_engine_answers_many_callers_at_once() -> None:
    config = tiny.shape("encoder_decoder")

    def build() -> Engine:
        shape = SequenceShape.from_config(config.to_dict())
        runtime = SequenceRuntime(tiny.graphs(config), shape, 6, SessionSettings(threads=1))
        return Engine(runtime, start_token=reference.BOS, end_token=reference.EOS)  # type: ignore[return-value]

    engine = InProcessEngine("tiny", build, lambda stats: None)  # type: ignore[arg-type]
    await engine.start()
    rng = random.Random(0)
    sources = [tuple(tiny.token_ids(rng, rng.randint(1, 24))) for _ in range(30)]
    decoding = Decoding(max_tokens=12)
    results = await asyncio.gather(
        *(
            collect(engine, GenerationRequest(id=f"r{i}", input_ids=source, decoding=decoding, stream=True))
            for i, source in enumerate(sources)
        )
    )
    await engine.drain(5)
    for source, events in zip(sources, results, strict=True):
        wanted = reference.greedy(tiny.model(config), source, 12).tokens
        assert streamed(events) == wanted
        assert list(events[-1].hypotheses[0].tokens) == wanted


async def test_closing_the_iterator_cancels_the_request() -> None:
    stepper = Countdown()
    async with running(stepper) as engine:
        async with aclosing(engine.submit(request("left", 10**6))) as events:
            async for _ in events:
                break
        await eventually(lambda: "left" in stepper.cancelled)
        assert not stepper.has_work
        assert streamed(await collect(engine, request("next"))) == [2, 1, 0]
        assert stepper.cancelled == ["left"]


async def test_cancelling_the_task_cancels_the_request() -> None:
    stepper = Countdown()
    async with running(stepper) as engine:
        task = asyncio.create_task(collect(engine, request("left", 10**6)))
        await eventually(lambda: "left" in stepper.left)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: stepper.cancelled == ["left"])
        assert engine.status.waiting_requests == 0


async def test_an_iterator_that_is_never_read_submits_nothing() -> None:
    stepper = Countdown()
    async with running(stepper) as engine:
        await engine.submit(request("unread")).aclose()
        assert engine.status.waiting_requests == 0
        assert not stepper.left
        assert stepper.cancelled == []


async def test_a_failing_engine_fails_every_request_and_stays_dead(caplog: pytest.LogCaptureFixture) -> None:
    stepper = Countdown()
    async with running(stepper) as engine:
        stepper.may_step.clear()
        tasks = [asyncio.create_task(collect(engine, request(f"r{i}"))) for i in range(5)]
        await eventually(lambda: engine.status.waiting_requests == 5)
        stepper.broken = True
        stepper.may_step.set()
        assert await asyncio.gather(*tasks) == [[DIED]] * 5
        assert not engine.status.alive
        assert "secret internals" in caplog.text  # in the log, and not in what callers read
        assert await collect(engine, request("late")) == [Failed(Failure.ENGINE, "the engine is not running")]
        caplog.clear()


@pytest.mark.parametrize("error", [RuntimeUnavailable("no such graph"), MemoryError(), ValueError("odd")])
async def test_what_build_raises_comes_out_of_start(error: Exception) -> None:
    def build() -> Countdown:
        raise error

    engine = InProcessEngine("tiny", build, lambda stats: None)  # type: ignore[arg-type]
    with pytest.raises(type(error)) as caught:
        await engine.start()
    assert caught.value is error
    assert not engine.status.alive
    assert await collect(engine, request("r")) == [Failed(Failure.ENGINE, "the engine is not running")]
    await engine.drain(1)


async def test_the_engine_is_built_in_the_thread_that_runs_it() -> None:
    built: list[int] = []
    stepper = Countdown()

    def build() -> Countdown:
        built.append(threading.get_ident())
        return stepper

    engine = InProcessEngine("tiny", build, lambda stats: None)  # type: ignore[arg-type]
    assert not engine.status.alive
    await engine.start()
    assert engine.status.alive
    await collect(engine, request("r"))
    assert set(built) == stepper.threads
    await engine.drain(1)


async def test_a_drain_lets_requests_finish_and_takes_no_new_ones() -> None:
    stepper = Countdown()
    async with running(stepper) as engine:
        stepper.may_step.clear()
        inside = asyncio.create_task(collect(engine, request("inside", 4)))
        await eventually(lambda: "inside" in stepper.left)
        drain = asyncio.create_task(engine.drain(10))
        await asyncio.sleep(0)
        assert await collect(engine, request("late")) == [SHUTTING_DOWN]
        assert not drain.done()
        stepper.may_step.set()
        assert streamed(await inside) == [3, 2, 1, 0]
        await asyncio.wait_for(drain, 5)
        assert not engine.status.alive


async def test_a_drain_out_of_time_fails_the_rest() -> None:
    stepper = Countdown()
    async with running(stepper) as engine:
        task = asyncio.create_task(collect(engine, request("endless", 10**9)))
        await eventually(lambda: "endless" in stepper.left)
        await engine.drain(0.05)
        events = await task
        assert events[-1] == SHUTTING_DOWN
        assert all(isinstance(event, TokensReady) for event in events[:-1])


async def test_a_burst_is_counted_before_the_engine_has_seen_it() -> None:
    stepper = Countdown()
    async with running(stepper) as engine:
        stepper.may_step.clear()
        tasks = [asyncio.create_task(collect(engine, request(f"r{i}", 1))) for i in range(7)]
        await asyncio.sleep(0)
        assert (engine.status.waiting_requests, engine.status.waiting_tokens) == (7, 21)
        stepper.may_step.set()
        await asyncio.gather(*tasks)
        assert (engine.status.waiting_requests, engine.status.waiting_tokens) == (0, 0)


async def test_traffic_that_comes_and_goes_leaves_nothing_behind() -> None:
    stepper, rng = Countdown(), random.Random(1)

    async def caller(engine: InProcessEngine, name: str) -> None:
        length, patience = rng.randint(1, 20), rng.randint(0, 25)
        await asyncio.sleep(rng.random() / 100)
        heard: list[Event] = []
        async with aclosing(engine.submit(request(name, length))) as events:
            async for event in events:
                heard.append(event)
                if len(heard) > patience:
                    break
        assert streamed(heard) == list(range(length - 1, -1, -1))[: len(streamed(heard))]
        if len(heard) <= patience:
            assert heard[-1] == Finished(())

    async with running(stepper) as engine:
        await asyncio.gather(*(caller(engine, f"r{i}") for i in range(200)))
        await eventually(lambda: not stepper.has_work)
        assert (engine.status.waiting_requests, engine.status.waiting_tokens) == (0, 0)
