"""``python -m tests.load.soak``: an hour of everyday calls. Memory must not grow; descriptors and tasks must be as before.

Growth is counted in bytes for each call, because that is how services leak, and compared with what a leak of one small object a
call would be. The front end is judged by what malloc has given out, not by what is resident: that moves with what malloc holds
for later, too, by megabytes and for minutes, which would hide a leak of this size, or look like one. ``--plant-leak BYTES``
starts a server that keeps so much of every call, which the same check must then find. What is allowed: ``tests.load.memory``.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from tests.load.everyday import LEAVING, Callers
from tests.load.memory import GRPC_BYTES, MOST_BYTES
from tests.load.running import Resting, ServerProcess, anonymous_bytes, server_process
from tests.load.subject import checked
from tests.load.trend import Slope, slope
from tests.load.verdict import conclude
from tests.load.watched_server import COUNTED, PLANT_LEAK

_QUIET_SECONDS = 3.0
"""After the last call, before it is seen what is left."""
_FEWEST_SAMPLES = 10
"""However long they take: fewer have no slope."""
_WARM_UP = 0.25
"""Share of the samples that show caches and pools filling up, at least, ..."""
_WARM_UP_CALLS = 10_000
"""... until so many calls, which is when a front end was seen to level off, or half of a run that is too short for that."""
_EXPECTED = {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
_LEFT = ("CANCELLED", "DEADLINE_EXCEEDED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at the server's processes from outside."""

    seconds: float
    """Since the load began."""
    calls: int
    """So far."""
    front_end: Resting
    engine_memory: int
    """Resident bytes that are no file's, of all engines together."""


@dataclass(slots=True)
class Report:
    samples: list[Sample] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    before: tuple[int, int] = (0, 0)
    """Descriptors and tasks, quiet."""
    after: tuple[int, int] = (0, 0)

    @property
    def known_bytes(self) -> float:
        """Growth of the front end for each call that is gRPC's: as if every call that its caller left had not been read yet."""
        return GRPC_BYTES * sum(self.statuses[status] for status in _LEFT) / max(1, self.statuses.total())

    def growth(self, of: Callable[[Sample], int]) -> Slope:
        """Bytes for each call, once warm."""
        cold = sum(sample.calls < _WARM_UP_CALLS for sample in self.samples)
        warm = self.samples[max(int(_WARM_UP * len(self.samples)), min(cold, len(self.samples) // 2)) :]
        return slope([one.calls for one in warm], [of(one) for one in warm])

    def problems(self, most_bytes: float) -> list[str]:
        """Nothing may grow, and growing is told from standing still: where the bounds leave it open, the run was too short."""
        problems = [f"{count} calls ended with {code}" for code, count in self.statuses.items() if code not in _EXPECTED]
        for name, growth, known in (
            ("front end", self.growth(front_end), self.known_bytes),
            ("engine", self.growth(engine), 0.0),
        ):
            if growth.low > most_bytes + known:
                problems.append(f"the {name} leaks {growth.middle:.0f} bytes a call")
            elif growth.high > most_bytes + known:
                problems.append(f"the {name} may leak up to {growth.high:.0f} bytes a call: the run was too short to tell")
        if self.after != self.before:
            problems.append(f"descriptors and tasks were {self.before} before, and {self.after} after")
        return problems


def front_end(sample: Sample) -> int:
    return sample.front_end.in_use


def resident(sample: Sample) -> int:
    return sample.front_end.memory


def engine(sample: Sample) -> int:
    return sample.engine_memory


async def soak(
    server: ServerProcess,
    seconds: float,
    *,
    rate: float = 40.0,
    every: float = 5.0,
    leaving: float = LEAVING,
    seed: int = 1,
    say: Callable[[Sample], None] = lambda _: None,
) -> Report:
    """Calls of every kind at ``rate`` a second (Poisson), a sample every so many seconds.

    Args:
        leaving: share of calls whose caller leaves after 1 to 50 ms, or gives them no more time than that.
    """
    report, callers = Report(), Callers(server.target, leaving, seed)
    for _ in range(40):
        await callers.call()
    await callers.renew()
    await asyncio.sleep(_QUIET_SECONDS)
    report.before = _open_things(await server.resting())
    callers.statuses.clear()
    began = time.monotonic()
    load = asyncio.create_task(callers.come(rate))
    try:
        while not load.done():
            elapsed = time.monotonic() - began
            if elapsed >= seconds and len(report.samples) >= _FEWEST_SAMPLES:
                break
            async with callers.quiet():
                report.samples.append(await _sample(server, elapsed, callers.statuses.total()))
            say(report.samples[-1])
            await asyncio.sleep(every)
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
    await callers.leave()
    for _ in range(10):  # a connection that was closed takes its time
        await asyncio.sleep(_QUIET_SECONDS)
        report.after = _open_things(await server.resting())
        if report.after == report.before:
            break
    report.statuses = callers.statuses
    await callers.close()
    return report


def _open_things(resting: Resting) -> tuple[int, int]:
    return resting.descriptors, resting.tasks


async def _sample(server: ServerProcess, seconds: float, calls: int) -> Sample:
    return Sample(
        seconds=seconds,
        calls=calls,
        front_end=await server.resting(),
        engine_memory=sum(anonymous_bytes(pid) for pid in server.engines),
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="Directory made by `python -m export`; without one, a tiny model with random weights.", callback=checked
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the load.")] = 60.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Calls a second.")] = 40.0,
    most_bytes: Annotated[float, typer.Option(min=0.0, help="Growth for each call that is none.")] = MOST_BYTES,
    plant_leak: Annotated[int, typer.Option(min=0, help="Serve with a server that leaks so many bytes a call.")] = 0,
    leaving: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of calls whose caller leaves, or has hardly any time.")
    ] = LEAVING,
    seed: Annotated[int, typer.Option(help="Fixes what is asked.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every sample here, a line each.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw memory over time here.")] = None,
) -> None:
    """Starts a server of its own, and exits with 1 unless memory, descriptors and tasks stood still."""

    if json_file is not None:
        json_file.write_text("", encoding="utf-8")

    def say(sample: Sample) -> None:
        if json_file is not None:  # at once: a run that is broken off has something to show, too
            with json_file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(sample)) + "\n")
        if int(sample.seconds / 60) > int((sample.seconds - every) / 60):
            print(_row(sample), flush=True)

    async def run(served: Path) -> Report:
        flags = ["--device", "cpu", "--engines", "1", "--threads", "1"]
        if plant_leak:
            flags += [PLANT_LEAK, str(plant_leak)]
        async with server_process(served, *flags, module="tests.load.watched_server", environment=COUNTED) as server:
            return await soak(server, 60 * minutes, rate=rate, every=every, leaving=leaving, seed=seed, say=say)

    every = min(5.0, 60 * minutes / 100)
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(bundle or _tiny_bundle(Path(folder))))
    last = report.samples[-1]
    facts = [
        f"{last.seconds / 60:.1f} minutes, {last.calls} calls: {dict(report.statuses)}",
        f"descriptors and tasks: {report.before} before, {report.after} after",
    ]
    for name, growth in (
        ("front end", report.growth(front_end)),
        ("front end, resident", report.growth(resident)),
        ("engine", report.growth(engine)),
    ):
        hourly = 3600 * last.calls / last.seconds / 2**20
        facts.append(
            f"{name}: {growth.middle:+.1f} bytes a call (95 %: {growth.low:+.1f} to {growth.high:+.1f}),"
            f" at this rate {growth.middle * hourly:+.2f} MiB an hour (to {growth.high * hourly:+.2f})"
        )
    facts.append(f"of the front end, up to {report.known_bytes:.1f} bytes a call are gRPC's own leak, of calls that were left")
    if png is not None:
        from tests.load.soak_plot import draw  # matplotlib takes a second

        draw(report.samples, png)
    conclude(facts, report.problems(most_bytes))


def _row(sample: Sample) -> str:
    return (
        f"{sample.seconds / 60:6.1f} min {sample.calls:8} calls: front end {sample.front_end.memory / 2**20:7.2f} MiB"
        f" ({sample.front_end.in_use / 2**20:.2f} in use),"
        f" engine {sample.engine_memory / 2**20:7.2f} MiB, {sample.front_end.descriptors} descriptors,"
        f" {sample.front_end.tasks} tasks, {sample.front_end.threads} threads"
    )


def _tiny_bundle(folder: Path) -> Path:
    from tests import tiny  # brings torch along

    return tiny.write_bundle(folder / "tiny", "encoder_decoder")


if __name__ == "__main__":
    app(prog_name="python -m tests.load.soak")
