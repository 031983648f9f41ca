"""An engine in a process of its own: what it answers, and what becomes of callers when it dies, hangs or cannot start."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.bundle import open_bundle
from server.batch.step_stats import StepStats
from server.device.session import RuntimeUnavailable
from server.engines import kept_process
from server.engines.build_engine import build_engine
from server.engines.child_link import ChildLink
from server.engines.engine_client import EngineClient, Loss
from server.engines.engine_pool import EnginePool
from server.engines.engine_spec import EngineSpec
from server.engines.in_flight import NOT_RUNNING, SHUTTING_DOWN, STOPPED
from server.engines.in_process import InProcessEngine
from server.engines.kept_process import Supervision
from server.engines.message_socket import LoopSocket, Message
from server.engines.remote_engine import RemoteEngine
from server.engines.wire import Ready
from server.requests import Decoding, Encoded, EncodingRequest, Event, Finished, GenerationRequest, TokensReady

QUICK = Supervision(stall_seconds=1.0, first_backoff_seconds=0.05)


def spec_of(bundle: Path, rows: int = 4) -> EngineSpec:
    fingerprint = open_bundle(bundle).fingerprint
    return EngineSpec(bundle=str(bundle), fingerprint=fingerprint, precision="fp32", rows=rows, device="cpu", threads=1)


@pytest.fixture(scope="module")
def spec(bundles: dict[str, Path]) -> EngineSpec:
    return spec_of(bundles["encoder_decoder"])


def request(name: str, tokens: int = 16, **others: object) -> GenerationRequest:
    decoding = Decoding(max_tokens=tokens, min_tokens=tokens)
    return GenerationRequest(id=name, input_ids=(5, 6, 7, 2), decoding=decoding, **others)  # type: ignore[arg-type]


async def collect(engine: EngineClient, request: GenerationRequest | EncodingRequest) -> list[Event]:
    async with asyncio.timeout(30), aclosing(engine.submit(request)) as events:
        return [event async for event in events]


def gathered(events: list[Event]) -> tuple[list[int], list[float], Event]:
    """Streamed tokens and their log-probabilities, however many came at a time, and the last event."""
    ready = [event for event in events if isinstance(event, TokensReady)]
    tokens, scores = [t for event in ready for t in event.tokens], [p for event in ready for p in event.log_probabilities]
    return tokens, scores, events[-1]


async def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@asynccontextmanager
async def running(
    spec: EngineSpec, on_step: Callable[[StepStats], None] = lambda stats: None, supervision: Supervision = QUICK
) -> AsyncIterator[tuple[RemoteEngine, list[Loss]]]:
    losses: list[Loss] = []
    engine = RemoteEngine("tiny", spec, on_step, losses.append, supervision)
    await engine.start()
    try:
        yield engine, losses
    finally:
        await engine.drain(0)
        assert not engine.status.alive
        assert engine.pid is None


async def test_it_answers_as_the_same_engine_in_this_process_does(spec: EngineSpec) -> None:
    requests = [request(f"r{n}", n, stream=bool(n % 2)) for n in range(1, 17)]
    here = InProcessEngine("here", lambda: build_engine(spec), lambda stats: None)
    await here.start()
    wanted = [gathered(events) for events in await asyncio.gather(*(collect(here, one) for one in requests))]
    await here.drain(1)
    steps: list[StepStats] = []
    async with running(spec, steps.append) as (engine, losses):
        assert [gathered(events) for events in await asyncio.gather(*(collect(engine, one) for one in requests))] == wanted
        assert engine.status.waiting_requests == engine.status.live_rows == 0
        assert (engine.status.row_capacity, engine.status.engines_up) == (4, 1)
        assert max(stats.rows for stats in steps) == 4
        assert sum(stats.new_tokens for stats in steps) == sum(range(1, 17))
        assert losses == []


async def test_it_encodes_too(bundles: dict[str, Path]) -> None:
    async with running(spec_of(bundles["encoder_only"])) as (engine, _):
        (event,) = await collect(engine, EncodingRequest(id="e", input_ids=(5, 6, 2)))
        assert isinstance(event, Encoded)
        assert len(event.probabilities) == 3


async def test_leaving_early_frees_the_rows(spec: EngineSpec) -> None:
    steps: list[StepStats] = []
    async with running(spec, steps.append) as (engine, _):
        async with aclosing(engine.submit(request("left", stream=True))) as events:
            assert isinstance(await anext(events), TokensReady)
        seen = len(steps)
        assert isinstance((await collect(engine, request("next")))[-1], Finished)
        assert all(stats.live_requests <= 1 for stats in steps[seen + 2 :])
        await eventually(lambda: engine.status.progress_age == 0)


async def test_kill_ends_what_is_in_flight_and_another_process_serves(
    spec: EngineSpec, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(spec) as (engine, losses):
        for round in range(3):
            tasks = [asyncio.create_task(collect(engine, request(f"{round}-{n}"))) for n in range(400)]
            await eventually(lambda: engine.status.live_requests > 0)
            before = engine.pid
            assert before is not None
            os.kill(before, signal.SIGKILL)
            killed = time.monotonic()
            ends = [events[-1] for events in await asyncio.gather(*tasks)]
            assert time.monotonic() - killed < 2
            assert all(isinstance(end, Finished) or end == STOPPED for end in ends)
            assert STOPPED in ends
            assert not engine.status.alive
            assert await collect(engine, request(f"{round}-late")) == [NOT_RUNNING]
            await eventually(lambda: engine.status.alive)
            assert engine.pid != before
            assert isinstance((await collect(engine, request(f"{round}-again")))[-1], Finished)
        assert losses == [Loss.DIED] * 3
    caplog.clear()


async def test_a_stopped_process_is_noticed_when_there_is_work_and_only_then(
    spec: EngineSpec, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(spec) as (engine, losses):
        before = engine.pid
        assert before is not None
        os.kill(before, signal.SIGSTOP)
        await asyncio.sleep(2 * QUICK.stall_seconds)
        assert engine.status.alive, "an idle engine owes nothing"
        stopped = time.monotonic()
        # Nobody waits for long: no single request is there for the whole time.
        ends = []
        while not losses:
            try:
                async with asyncio.timeout(0.2):
                    ends += await collect(engine, request(f"r{len(ends)}-{time.monotonic()}"))
            except TimeoutError:
                assert engine.status.progress_age >= 0
        assert 0.7 < time.monotonic() - stopped < 3
        assert losses == [Loss.STALLED]
        await eventually(lambda: engine.status.alive)
        assert not exists(before)
        assert isinstance((await collect(engine, request("again")))[-1], Finished)
    caplog.clear()


async def test_a_reader_who_does_not_read_is_no_stall(spec: EngineSpec) -> None:
    async with running(spec) as (engine, losses):
        async with aclosing(engine.submit(request("slow", stream=True))) as events:
            await anext(events)
            await asyncio.sleep(2 * QUICK.stall_seconds)
            assert isinstance([event async for event in events][-1], Finished)
        assert losses == []


async def test_an_engine_that_cannot_be_says_why(spec: EngineSpec, tmp_path: Path) -> None:
    for wrong, reason in [
        (replace(spec, bundle=str(tmp_path / "none")), "not a bundle"),
        (replace(spec, fingerprint="0" * 64), "is not the bundle that the server was started with"),
    ]:
        engine = RemoteEngine("tiny", wrong, lambda stats: None)
        with pytest.raises(RuntimeUnavailable, match=reason):
            await engine.start()
        assert not engine.status.alive
        assert await collect(engine, request("r")) == [NOT_RUNNING]
        await engine.drain(1)


async def test_the_last_word_of_a_process_that_was_given_up_is_not_heard(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(ChildLink[Message]):
        """Says that it is ready just before it is gone."""

        async def kill(self) -> None:
            await super().kill()
            engine._hear(Ready())

    monkeypatch.setattr(kept_process, "ChildLink", Late)
    engine = RemoteEngine("tiny", spec, lambda stats: None, supervision=Supervision(start_seconds=0.01))
    with pytest.raises(RuntimeUnavailable, match="was not ready in time"):
        await engine.start()
    assert not engine.status.alive
    assert await collect(engine, request("r")) == [NOT_RUNNING]


async def test_a_bundle_that_is_gone_does_not_stop_the_attempts(
    bundles: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles["encoder_decoder"], bundle)
    async with running(spec_of(bundle)) as (engine, _):
        bundle.rename(tmp_path / "away")
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await eventually(lambda: "engine process cannot start" in caplog.text)
        (tmp_path / "away").rename(bundle)
        await eventually(lambda: engine.status.alive)
        assert isinstance((await collect(engine, request("again")))[-1], Finished)
    caplog.clear()


def descriptors() -> int:
    """That this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


async def test_a_drain_finishes_what_is_in_flight_and_leaves_nothing_behind(spec: EngineSpec) -> None:
    before = descriptors()
    engine = RemoteEngine("tiny", spec, lambda stats: None)
    await engine.start()
    pid = engine.pid
    assert pid is not None
    tasks = [asyncio.create_task(collect(engine, request(f"r{n}"))) for n in range(20)]
    await asyncio.sleep(0)
    drain = asyncio.create_task(engine.drain(20))
    await asyncio.sleep(0)
    assert await collect(engine, request("late")) == [SHUTTING_DOWN]
    assert all(isinstance(events[-1], Finished) for events in await asyncio.gather(*tasks))
    await drain
    assert not exists(pid)
    await eventually(lambda: descriptors() == before)


async def test_a_stop_during_start_up_leaves_nothing_behind(spec: EngineSpec) -> None:
    engine = RemoteEngine("tiny", spec, lambda stats: None)
    start = asyncio.create_task(engine.start())
    await eventually(lambda: engine.pid is not None)
    pid = engine.pid
    assert pid is not None
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await engine.drain(1)
    assert not exists(pid)


async def test_a_stop_just_after_the_process_was_spawned_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    opening = asyncio.Event()

    async def open_slowly(*_: object) -> None:
        opening.set()
        await asyncio.Event().wait()

    spawned: list[asyncio.subprocess.Process] = []
    spawn = asyncio.create_subprocess_exec

    async def watched(*command: str, **others: Any) -> asyncio.subprocess.Process:
        spawned.append(await spawn(*command, **others))
        return spawned[-1]

    monkeypatch.setattr(LoopSocket, "open", open_slowly)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", watched)
    start = asyncio.create_task(ChildLink.start("server.engines.engine_process", bytes, print))
    await opening.wait()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await asyncio.wait_for(spawned[0].wait(), 30) == -signal.SIGKILL


_PARENT = """
import asyncio, sys
from server.engines.engine_spec import EngineSpec
from server.engines.remote_engine import RemoteEngine
from server.engines.wire import Ready

async def main():
    spec = EngineSpec(bundle=sys.argv[1], fingerprint=sys.argv[2], precision="fp32", rows=2, device="cpu", threads=1)
    engine = RemoteEngine("tiny", spec, lambda stats: None)
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_an_engine_dies_with_its_parent(spec: EngineSpec) -> None:
    command = [sys.executable, "-c", _PARENT, spec.bundle, spec.fingerprint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert exists(pid)
        os.kill(pid, signal.SIGTERM)  # a signal to the whole group is not its business
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 5
        while exists(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not exists(pid)


async def test_a_pool_spreads_requests_and_outlives_one_of_its_engines(
    spec: EngineSpec, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[list[StepStats]] = [[], []]
    engines = [RemoteEngine("tiny", spec, seen.append, supervision=QUICK) for seen in steps]
    pool = EnginePool(engines)
    await pool.start()
    results = await asyncio.gather(*(collect(pool, request(f"r{n}")) for n in range(20)))
    assert all(isinstance(events[-1], Finished) for events in results)
    counts = [sum(len(stats.joined) for stats in seen) for seen in steps]
    assert counts == [10, 10]
    assert (pool.status.row_capacity, pool.status.engines_up) == (8, 2)
    assert engines[0].pid is not None
    os.kill(engines[0].pid, signal.SIGKILL)
    await eventually(lambda: not engines[0].status.alive)
    assert pool.status.alive
    assert pool.status.engines_up == 1
    results = await asyncio.gather(*(collect(pool, request(f"s{n}")) for n in range(5)))
    assert all(isinstance(events[-1], Finished) for events in results)
    await pool.drain(5)
    assert not pool.status.alive
    caplog.clear()
