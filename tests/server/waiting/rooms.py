"""What tests of the waiting room share: an engine with rows that are let go by name, callers, and turns of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from types import TracebackType

from server.call import Call, current_call
from server.engines.engine_client import EngineStatus
from server.engines.in_flight import NOT_RUNNING
from server.requests import Decoding, Event, Finished, GenerationRequest
from server.waiting.admission import AdmissionLimits, Forecast
from server.waiting.waiting_room import WaitingRoom
from tests.server.fake_engine import FakeEngine, Request, Step, hypothesis

DONE = Finished((hypothesis((5, 2)),))


class Rows(FakeEngine):
    """Has so many rows; a request holds ``each`` of them until it is let go. Answers in the order in which they are let go."""

    def __init__(self, rows: int, each: int = 1) -> None:
        super().__init__(self.hold, most=rows // each)
        self.rows, self.each = rows, each
        self.gates: dict[str, asyncio.Event] = {}

    def hold(self, request: Request) -> Iterator[Step]:
        self.gates[request.id] = asyncio.Event()
        yield self.gates[request.id]
        yield DONE if self.alive else NOT_RUNNING

    def let_go(self, *names: str) -> None:
        """In the step that begins now."""
        self._report()
        for name in names:
            self.gates.pop(name).set()

    @property
    def status(self) -> EngineStatus:
        running = len(self._with_rows)
        return EngineStatus(
            alive=self.alive,
            live_rows=running * self.each,
            live_requests=running,
            row_capacity=self.rows,
            waiting_requests=self.live - running,
            waiting_tokens=0,
        )


@contextmanager
def call(tenant: str = "", priority: int = 0, seconds: float = 60.0) -> Iterator[None]:
    token = current_call.set(Call("Generate", "id", tenant=tenant, priority=priority, longest_seconds=seconds))
    try:
        yield
    finally:
        current_call.reset(token)


def request(name: str, beams: int = 1) -> GenerationRequest:
    return GenerationRequest(id=name, input_ids=(5, 6, 2), decoding=Decoding(max_tokens=5, beams=beams))


async def collect(room: WaitingRoom, name: str, beams: int = 1) -> list[Event]:
    async with asyncio.timeout(10), aclosing(room.submit(request(name, beams))) as events:
        return [event async for event in events]


def enter(
    room: WaitingRoom, *names: str, tenant: str = "", priority: int = 0, beams: int = 1
) -> list[asyncio.Task[list[Event]]]:
    with call(tenant, priority):
        return [asyncio.create_task(collect(room, name, beams)) for name in names]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def names(engine: Rows) -> list[str]:
    return [one.id for one in engine.submitted]


async def leave(tasks: list[asyncio.Task[list[Event]]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Scene:
    """A room in front of an engine with so many rows, by a clock that moves in ``after`` alone. At the end everybody leaves."""

    def __init__(self, rows: int, limits: AdmissionLimits | None = None, each: int = 1) -> None:
        self.now = 0.0
        self.engine = Rows(rows, each)
        self.room = WaitingRoom(self.engine, limits or AdmissionLimits(), clock=lambda: self.now)
        self._tasks: list[asyncio.Task[list[Event]]] = []

    async def __aenter__(self) -> Scene:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await leave(self._tasks)

    async def enter(
        self, *names: str, tenant: str = "", beams: int = 1, seconds: float = 60.0
    ) -> list[asyncio.Task[list[Event]]]:
        with call(tenant, seconds=seconds):
            tasks = [asyncio.create_task(collect(self.room, name, beams)) for name in names]
        self._tasks += tasks
        await settle()
        return tasks

    async def after(self, seconds: float, *ended: str) -> None:
        """So much later these end, in one step."""
        self.now += seconds
        if ended:
            self.engine.let_go(*ended)
        await settle()

    def forecast(self, requests: int = 1, tenant: str = "") -> Forecast:
        with call(tenant):
            return self.room.forecast(requests)
