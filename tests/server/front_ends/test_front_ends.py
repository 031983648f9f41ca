"""Several front ends on one port: what callers, and who looks after the server, see of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from protos import transformer_pb2 as pb
from protos.transformer_pb2_grpc import TransformerStub
from tests.load.running import ServerProcess, server_process

TINY = ("--device", "cpu", "--engines", "1", "--threads", "1", "--max-rows", "8", "--front-ends", "2")
REQUEST = pb.GenerateRequest(
    inputs=[pb.Input(text="abc def")], options=pb.GenerationOptions(beams=1, max_tokens=16, min_tokens=16)
)


async def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


class Callers:
    """Calls over many connections, which the kernel spreads over the front ends."""

    def __init__(self, target: str, connections: int = 12) -> None:
        self.target, self.connections = target, connections
        self.ended: Counter[str] = Counter()
        """Calls, by status."""
        self.streaming = False
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Callers:
        self._stack = AsyncExitStack()
        self._tasks = []
        for _ in range(self.connections):
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
            channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(self.target, options=options))
            self._tasks.append(asyncio.create_task(self._call_on(TransformerStub(channel))))
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._stack.aclose()

    async def _call_on(self, stub: TransformerStub) -> None:
        while not self._stop.is_set():
            try:
                if self.streaming:
                    async for _ in stub.GenerateStream(REQUEST, timeout=20):
                        pass
                else:
                    await stub.Generate(REQUEST, timeout=20)
                self.ended["OK"] += 1
            except grpc.aio.AioRpcError as error:
                self.ended[error.code().name] += 1
                await asyncio.sleep(0.05)


def processes_of(server: ServerProcess) -> list[int]:
    return [*server.front_ends, *server.engines]


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_they_share_the_calls_and_their_counters_are_one(bundles: dict[str, Path]) -> None:
    async with server_process(bundles["encoder_decoder"], *TINY) as server:
        assert (len(server.front_ends), len(server.engines)) == (2, 1)
        async with Callers(server.target) as callers:
            await eventually(lambda: callers.ended["OK"] >= 50)
            callers.streaming = True
            await eventually(lambda: callers.ended["OK"] >= 100)
        series = await server.series()
        if promtool := shutil.which("promtool"):
            checked = subprocess.run([promtool, "check", "metrics"], input=server.scrape(), capture_output=True, text=True)
            assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
        assert dict(callers.ended) == {"OK": series["transformer_requests_total", "ok"]}
        assert series["transformer_front_ends_up", ""] == 2
        assert series["transformer_ready", ""] == 1
        assert series["transformer_request_input_tokens_count", ""] == callers.ended["OK"]
        assert series["transformer_output_tokens_total", ""] == 16 * callers.ended["OK"]
        assert series["transformer_requests_running", ""] == series["transformer_requests_waiting", ""] == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_one_that_is_lost_is_replaced_and_only_its_own_calls_end(
    bundles: dict[str, Path], number: signal.Signals
) -> None:
    async with server_process(bundles["encoder_decoder"], *TINY, "--stall-seconds", "1") as server:
        first, second = server.front_ends
        (engine,) = server.engines
        async with Callers(server.target) as callers:
            await eventually(lambda: callers.ended["OK"] >= 20)
            os.kill(first, number)
            await eventually(lambda: first not in server.front_ends and len(server.front_ends) == 2)
            before = callers.ended["OK"]
            await eventually(lambda: callers.ended["OK"] >= before + 50)
        series = await server.series()
        assert second in server.front_ends
        assert server.engines == [engine]
        assert set(callers.ended) <= {"OK", "UNAVAILABLE"}
        assert callers.ended["UNAVAILABLE"] <= callers.connections + 4, "some may find the port closed while they come back"
        assert 0 <= series["transformer_requests_total", "ok"] - callers.ended["OK"] <= callers.connections, (
            "what a lost front end has counted stays counted"
        )
        reason = "died" if number is signal.SIGKILL else "stalled"
        assert series["transformer_front_end_restarts_total", reason] == 1
        assert series["transformer_requests_running", ""] == 0, "nothing is computed for those who are gone"


async def test_stopping_finishes_what_is_in_flight(bundles: dict[str, Path]) -> None:
    async with server_process(bundles["encoder_decoder"], *TINY) as server:
        async with Callers(server.target) as callers:
            callers.streaming = True
            await eventually(lambda: callers.ended["OK"] >= 20)
            everything = processes_of(server)
            os.kill(server.pid, signal.SIGTERM)
        assert set(callers.ended) == {"OK"}
        await eventually(lambda: not exists(server.pid))
    assert not [pid for pid in everything if exists(pid)]


async def test_a_second_signal_does_not_wait(bundles: dict[str, Path]) -> None:
    async with server_process(bundles["encoder_decoder"], *TINY) as server:
        (engine,) = server.engines
        os.kill(engine, signal.SIGSTOP)  # nothing in flight comes to its end by itself
        async with Callers(server.target) as callers:
            series = server.series
            async with asyncio.timeout(30):
                while (await series())["transformer_requests_waiting", ""] < callers.connections:
                    await asyncio.sleep(0.05)
            everything = processes_of(server)
            os.kill(server.pid, signal.SIGTERM)
            await asyncio.sleep(2)
            assert exists(server.pid) and callers.ended["OK"] == 0, "it waits for what is in flight"
            os.kill(server.pid, signal.SIGTERM)
            await eventually(lambda: not any(exists(pid) for pid in [server.pid, *everything]), seconds=10)
        assert set(callers.ended) == {"UNAVAILABLE"}


async def test_nothing_outlives_the_server(bundles: dict[str, Path]) -> None:
    async with server_process(bundles["encoder_decoder"], *TINY) as server:
        everything = processes_of(server)
        os.kill(server.pid, signal.SIGKILL)
        await eventually(lambda: not any(map(exists, everything)), seconds=5)


async def test_a_second_server_on_the_port_is_an_error(bundles: dict[str, Path]) -> None:
    async with server_process(bundles["encoder_decoder"], *TINY) as server:
        for front_ends in ("1", "2"):
            command = [sys.executable, "-m", "server", str(bundles["encoder_decoder"]), "--http-port", "0"]
            options = ["--port", str(server.port), "--front-ends", front_ends, "--device", "cpu"]
            done = await asyncio.to_thread(subprocess.run, [*command, *options], capture_output=True, text=True, timeout=60)
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1] == f"error: cannot listen on 127.0.0.1:{server.port}"
