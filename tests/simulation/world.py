"""One life of a service, made from a seed: callers of several tenants, an engine that dies now and then, and what must hold."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from server.batch.engine import Engine
from server.call import Call, current_call
from server.edge.fan_out import RequestFailed, gather_results
from server.engines.engine_client import Changed, EngineStatus
from server.engines.in_flight import STOPPED, InFlight
from server.engines.stepper import Command
from server.requests import (
    Decoding,
    Encoded,
    EncodingRequest,
    Event,
    Failure,
    Finished,
    GenerationRequest,
    Sampling,
    TokensReady,
)
from server.waiting.admission import AdmissionLimits, Refused, Tenant
from server.waiting.waiting_room import WaitingRoom, _Use
from tests.simulation.checked_queue import CheckedQueue
from tests.simulation.rules import Rules
from tests.simulation.toy_model import EOS, VOCABULARY, ToyModel
from tests.simulation.virtual_time import run

_BOS = 1
_TENANTS = {"a": Tenant(weight=2.0), "b": Tenant(max_waiting=6), "c": Tenant(max_rows=1)}


class VirtualCall(Call):
    """Its seconds are those of the event loop."""

    @property
    def seconds(self) -> float:
        return asyncio.get_running_loop().time() - self.started


class VirtualEngine:
    """An ``EngineClient``: the real engine and the real books, steps that take as long as the seed says, and faults."""

    def __init__(self, rng: random.Random, rows: int) -> None:
        self._rng, self._rows = rng, rows
        self._in_flight = InFlight()
        self._commands: list[Command] = []
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self.pace = rng.choice([0.001, 0.01, 0.1])
        self.engine = self._build()
        self.waiting_outside: Callable[[], int] = lambda: 0
        """Requests in the queue in front of this engine."""
        self._rows_of: Counter[str] = Counter()
        """Held or asked for, by tenant."""

    def _build(self) -> Engine:
        loop = asyncio.get_running_loop()
        model = ToyModel(self._rows, encoding_overhead=self.pace / 4)
        return Engine(model, start_token=_BOS, end_token=EOS, join_tokens=20, clock=loop.time)

    async def start(self) -> None:
        self._in_flight.alive = True
        self._worker = asyncio.create_task(self._work())

    async def submit(self, request: GenerationRequest | EncodingRequest) -> AsyncGenerator[Event, None]:
        books = self._in_flight
        most = self._rows + max(1, self._rows // 4)  # with as much as rows can be free, and the little more
        assert not books.alive or books.draining or books.waiting_requests < most, "the engine is given what could still wait"
        assert isinstance(request, GenerationRequest)
        with self._held(current_call.get().tenant, request.decoding.rows) as release:
            async with aclosing(books.run(request, self._send)) as events:
                async for event in events:
                    if not isinstance(event, TokensReady):
                        release()
                    yield event

    @contextlib.contextmanager
    def _held(self, tenant: str, rows: int) -> Iterator[Callable[[], None]]:
        """A tenant holds no more rows than it may, or a single request that is wider."""
        most = _TENANTS.get(tenant, Tenant()).max_rows
        assert most is None or not self._rows_of[tenant] or self._rows_of[tenant] + rows <= most, "a tenant has too many rows"
        self._rows_of[tenant] += rows
        with contextlib.ExitStack() as release:
            release.callback(self._rows_of.subtract, {tenant: rows})
            yield release.close

    def listen(self, changed: Changed) -> None:
        self._in_flight.listeners.append(changed)

    @property
    def status(self) -> EngineStatus:
        books = self._in_flight
        return EngineStatus(
            alive=books.alive,
            live_rows=books.live_rows,
            live_requests=books.live_requests,
            row_capacity=self._rows if books.alive else 0,
            waiting_requests=books.waiting_requests,
            waiting_tokens=books.waiting_tokens,
        )

    async def drain(self, timeout: float) -> None:
        await self._in_flight.drain(timeout)
        self._in_flight.alive = False
        await self._stop()

    async def _stop(self) -> None:
        """What its work failed with, if it did, is raised here."""
        assert self._worker is not None
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker

    async def crash(self) -> None:
        """Everything in it is lost; another takes its place after a while."""
        await self._stop()
        self._in_flight.alive = False
        self._in_flight.fail_all(STOPPED)
        assert not self._in_flight.unanswered, "requests wait for an engine that is gone"
        self._commands.clear()
        await asyncio.sleep(self._rng.uniform(0.0, 20 * self.pace))
        self.engine = self._build()
        if not self._in_flight.draining:
            await self.start()

    def _send(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.set()

    async def _work(self) -> None:
        while True:
            if not self.engine.has_work and not self._commands:
                self._wake.clear()
                for _ in range(5):  # who has just been answered, or called, gets a word in
                    await asyncio.sleep(0)
                assert self._commands or not self.waiting_outside(), "the engine is idle while requests wait"
                await self._wake.wait()
            commands, self._commands = self._commands, []
            for command in commands:
                if isinstance(command, str):
                    self.engine.cancel(command)
                else:
                    assert isinstance(command, GenerationRequest)
                    self.engine.submit(command)
            if self.engine.has_work:
                events, stats = self.engine.step()
                assert stats.live_rows <= self._rows
                await asyncio.sleep(self._rng.uniform(0.5, 1.5) * self.pace)
                self._in_flight.deliver(events, stats)


@dataclass(slots=True)
class Ledger:
    """How the calls of one life ended."""

    ends: Counter[str]
    calls: int = 0


def live(seed: int) -> Ledger:
    """One life. Raises AssertionError, with the seed, when something did not hold."""
    try:
        return run(_life(seed))
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


def ends_of(seeds: range) -> Counter[str]:
    """How the calls of these lives ended. Raises AssertionError, which names the seed."""
    ends: Counter[str] = Counter()
    for seed in seeds:
        ends.update(live(seed).ends)
    return ends


async def _life(seed: int) -> Ledger:
    rng, ledger = random.Random(seed), Ledger(Counter())
    loop = asyncio.get_running_loop()
    engine = VirtualEngine(rng, rows=rng.choice([2, 4, 8]))
    limits = AdmissionLimits(
        max_waiting_requests=rng.choice([4, 16, 64]), max_waiting_tokens=rng.choice([30, 300]), tenants=_TENANTS
    )
    room = WaitingRoom(engine, limits, clock=loop.time)
    room._queue = CheckedQueue()
    rules = Rules(room, limits)
    engine.waiting_outside = lambda: room.status.waiting_requests - engine.status.waiting_requests
    await room.start()
    count, crowded = rng.randint(3, 40), rng.choice([0.0, 1.0, 5.0, 30.0])
    calls = [asyncio.create_task(_call(f"{seed}.{n}", rng.randrange(2**32), engine.pace, crowded, rules)) for n in range(count)]
    if rng.random() < 0.3:
        await asyncio.sleep(rng.uniform(0, crowded) * engine.pace * 10)
        await engine.crash()
    drains = rng.random() < 0.3
    if drains:
        await asyncio.sleep(rng.uniform(0, crowded) * engine.pace * 10)
        await room.drain(rng.choice([0.0, 1.0, 100.0]))
    ledger.ends.update(await asyncio.gather(*calls))
    ledger.calls = count
    assert ledger.ends.total() == count, "every call has one end"
    await asyncio.sleep(5 * engine.pace)
    status = room.status
    assert (status.waiting_requests, status.waiting_tokens, status.live_rows) == (0, 0, 0), f"left behind: {status}"
    assert not room._admission._requests and not room._admission._tokens, "a tenant that has nothing on the way is remembered"
    assert all(use == _Use() for use in room._use.values()), f"a tenant that has nothing holds something: {room._use}"
    assert drains or (not engine.engine.has_work and engine.engine.rows.live == 0), "rows without an owner"
    if not drains:
        await room.drain(100.0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks left behind"
    return ledger


async def _call(name: str, seed: int, pace: float, crowded: float, rules: Rules) -> str:
    """What the service does for one call; how it ended."""
    rng, loop = random.Random(seed), asyncio.get_running_loop()
    await asyncio.sleep(rng.uniform(0, crowded) * pace * 10)
    deadline = pace * rng.choice([3, 10, 40, 400])
    started = loop.time()
    call = VirtualCall(
        "Generate",
        name,
        tenant=rng.choice(["a", "b", "c", "stranger"]),
        priority=rng.choice([0, 0, 0, 1, -1]),
        longest_seconds=deadline,
        started=started,
    )
    current_call.set(call)
    requests = [_request(rng, f"{name}.{n}") for n in range(rng.choice([1, 1, 1, 3]))]
    work = asyncio.ensure_future(gather_results(rules.room, requests, rules.admit(call, requests)))
    if rng.random() < 0.15:
        loop.call_later(rng.uniform(0, deadline), work.cancel)
    try:
        async with asyncio.timeout(deadline):
            results = await work
    except TimeoutError:
        assert loop.time() <= started + deadline * 1.001, "a call outlived its deadline"
        return "deadline"
    except asyncio.CancelledError:
        return "cancelled"
    except Refused:
        assert loop.time() == started, "a refusal took time"
        return "refused"
    except RequestFailed as failed:
        assert failed.failed.failure in (Failure.ENGINE, Failure.SHUTTING_DOWN, Failure.OVERLOADED), failed.failed
        return failed.failed.failure.value
    for request, result in zip(requests, results, strict=True):
        assert result == alone(request), f"{request.id}: the result depends on what ran beside it"
    return "ok"


def _request(rng: random.Random, name: str) -> GenerationRequest:
    rows = rng.choice([1, 1, 2])
    sampling = Sampling(seed=rng.randrange(100), temperature=1.0) if rng.random() < 0.3 else None
    decoding = Decoding(
        max_tokens=rng.randint(1, 12), beams=1 if sampling else rows, hypotheses=rng.randint(1, rows), sampling=sampling
    )
    source = tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randint(1, 9)))
    return GenerationRequest(id=name, input_ids=source, decoding=decoding, stream=rng.random() < 0.5)


def alone(request: GenerationRequest) -> Finished | Encoded:
    """The result of a request that had an engine for itself."""
    engine = Engine(ToyModel(2), start_token=_BOS, end_token=EOS)
    engine.submit(request)
    while engine.has_work:
        for _, event in engine.step()[0]:
            if isinstance(event, Finished):
                return event
    raise AssertionError(f"{request.id} had no result when alone")
