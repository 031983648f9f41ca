"""One attack on one server: calls and connections, a canary beside them, and what is left of it all afterwards."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from tests.load.fuzz.calls import Canary, Strange, generator, send_all
from tests.load.fuzz.frames import ABUSES
from tests.load.fuzz.line import Line
from tests.load.memory import GRPC_BYTES, MOST_BYTES, WARM_BYTES
from tests.load.running import Resting, ServerProcess, anonymous_bytes

_CANARY_PAUSE_SECONDS = 0.25
_ABUSES_AT_ONCE = 8
_ABUSES_A_LOOK = 500
_SETTLING_SECONDS = 60.0
_MOST_SHOWN = 20


@dataclass(slots=True)
class Report:
    calls: Counter[str] = field(default_factory=Counter)
    """Mutated requests, by how they ended."""
    connections: Counter[str] = field(default_factory=Counter)
    """Abused, by how."""
    frames: int = 0
    """Sent on them."""
    begun: int = 0
    """Calls on them."""
    statuses: Counter[str] = field(default_factory=Counter)
    """That the server answered on them, as numbers."""
    words: Counter[str] = field(default_factory=Counter)
    """That came with statuses, shortened."""
    songs: int = 0
    """Of the canary: one call of each method."""
    refused: int = 0
    """Of its calls."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the front end, every 500 abuses."""
    seconds: float = 0.0
    before: Resting | None = None
    after: Resting | None = None
    given_back: int = 0
    """``after.memory`` once malloc has returned what it can: it keeps the most that was in use at once, for the next burst."""
    problems: list[str] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Bytes that the front end has in use and had not before."""
        assert self.before is not None
        assert self.after is not None
        return self.after.in_use - self.before.in_use

    @property
    def resident_growth(self) -> int:
        """Bytes of the front end's memory that nothing gives back: in use, or in one piece with something that is."""
        assert self.before is not None
        return self.given_back - self.before.memory

    @property
    def growth_allowed(self) -> float:
        """As for the soak, and as if each call of an abuse had ended before it was read."""
        left = self.begun + self.calls["CANCELLED"] + self.calls["DEADLINE_EXCEEDED"]
        return WARM_BYTES + MOST_BYTES * (self.calls.total() + self.begun) + GRPC_BYTES * left


async def attack(
    server: ServerProcess,
    seed: int,
    *,
    calls: range = range(0),
    abuses: range = range(0),
    minutes: float = 60.0,
    say: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Sends mutated requests, then abuses connections.

    Args:
        calls, abuses: the numbers of those that are made.
        minutes: after which none is begun any more.
    """
    report = Report()
    engines = server.engines
    async with grpc.aio.insecure_channel(server.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        canary = Canary(channel)
        for _ in range(3):
            await canary.sing()
        await asyncio.sleep(1.0)
        report.before = await server.resting()
        began = time.monotonic()
        singing = asyncio.create_task(_sing_on(canary))

        def ended(strange: Strange) -> None:
            report.calls[strange.status] += 1
            if strange.wrong:
                _complain(
                    report, f"call {strange.number} ({strange.method}) ended with {strange.status}: {strange.details[:200]}"
                )
            if report.calls.total() % 10_000 == 0:
                report.seconds = time.monotonic() - began
                say(report)

        until = began + 60 * minutes
        await send_all(server.target, seed, calls, until=until, ended=ended)
        await _abuse_all(server, seed, abuses, until, report)
        singing.cancel()
        await asyncio.gather(singing, return_exceptions=True)
        report.seconds = time.monotonic() - began
        await canary.sing()
        report.songs, report.refused = canary.songs, canary.refused
        report.problems += [f"{count} times {problem}" for problem, count in canary.problems.items()]
        report.after = await _settled(server, report.before)
        report.given_back = await server.given_back()
        await canary.sing()
    if server.engines != engines:
        report.problems.append(f"engine processes were {engines}, and are {server.engines}")
    if (report.before.descriptors, report.before.tasks) != (report.after.descriptors, report.after.tasks):
        report.problems.append(f"not as it was: {report.before} before, {report.after} after")
    return report


async def _sing_on(canary: Canary) -> None:
    while True:
        await canary.sing()
        await asyncio.sleep(_CANARY_PAUSE_SECONDS)


async def _abuse_all(server: ServerProcess, seed: int, numbers: range, until: float, report: Report) -> None:
    turns, held = iter(numbers), list[Line]()

    async def abuser() -> None:
        for number in turns:
            if time.monotonic() > until:
                return
            if number % _ABUSES_A_LOOK == 0:
                report.memory.append(anonymous_bytes(server.pid))
            rng, abuse = generator(seed, number), ABUSES[number % len(ABUSES)]
            name = abuse.__name__.replace("_", " ")
            lines = await abuse(server.port, rng)
            report.connections[name] += len(lines)
            for line in lines:
                report.frames += line.sent
                report.begun += line.begun
                report.statuses.update(line.statuses)
                report.words.update(f"{status} {words}".partition("(")[0] for status, words in line.words.items() if words)
                for fault in line.faults:
                    _complain(report, f"abuse {number} ({name}): {fault}")
                if rng.random() < 0.2:  # left open for a while
                    held.append(line)
                else:
                    line.hang_up(rudely=rng.random() < 0.3)
            while len(held) > 32:
                held.pop(0).hang_up(rudely=rng.random() < 0.3)

    await asyncio.gather(*(abuser() for _ in range(_ABUSES_AT_ONCE)))
    for line in held:
        line.hang_up()


async def _settled(server: ServerProcess, before: Resting) -> Resting:
    """Connections that were left are noticed, and calls that nobody waits for reach their deadlines."""
    end = time.monotonic() + _SETTLING_SECONDS
    while True:
        now = await server.resting()
        if (now.descriptors, now.tasks) == (before.descriptors, before.tasks) or time.monotonic() > end:
            return now
        await asyncio.sleep(0.5)


def _complain(report: Report, problem: str) -> None:
    if len(report.problems) < _MOST_SHOWN:
        report.problems.append(problem)
