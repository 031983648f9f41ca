"""``python -m tests.bench.call_cost [BUNDLE]``: processor time of a call that is refused, and of one that is answered.

Beside the server stands a bare grpc.aio server whose handlers are one line each: what it spends is gRPC's own, and no server on
it can spend less. The engine is stopped meanwhile, with one request in its only row and one waiting, so every further one is
refused, and nothing but the front end and the caller takes part.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import grpc
import typer

from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc
from tests.bench.front_ends import processor_seconds
from tests.load.report import describe_machine
from tests.load.running import server_process

_TEXT = "3. März 2026"
_WARM_UP = 0.2
"""Share of the calls that come before those that are counted."""
_FULL = ("--device", "cpu", "--engines", "1", "--threads", "1", "--max-rows", "1", "--max-waiting-requests", "1")
_FOREVER = ("--stall-seconds", "3600")
_REFUSED = grpc.StatusCode.RESOURCE_EXHAUSTED

Call = Callable[[transformer_pb2_grpc.TransformerStub], grpc.aio.UnaryUnaryCall]


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor seconds of one call."""

    server: float
    caller: float


def refused(stub: transformer_pb2_grpc.TransformerStub) -> grpc.aio.UnaryUnaryCall:
    return stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text=_TEXT)]), timeout=60)


def answered(stub: transformer_pb2_grpc.TransformerStub) -> grpc.aio.UnaryUnaryCall:
    return stub.Tokenize(pb.TokenizeRequest(texts=[_TEXT]), timeout=60)


CALLS: dict[str, Call] = {"refused (Generate)": refused, "answered (Tokenize)": answered}


async def cost(target: str, pid: int, call: Call, calls: int, at_once: int) -> Cost:
    """Of ``calls`` calls, each sent when one of ``at_once`` has ended. Raises AioRpcError when one ends as it should not."""
    wanted = _REFUSED if call is refused else grpc.StatusCode.OK
    async with grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = transformer_pb2_grpc.TransformerStub(channel)

        async def run(count: int) -> None:
            left = iter(range(count))

            async def caller() -> None:
                for _ in left:
                    try:
                        await call(stub)
                    except grpc.aio.AioRpcError as error:
                        if error.code() is not wanted:
                            raise

            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(caller())

        await run(round(_WARM_UP * calls))
        server, own = processor_seconds([pid]), time.process_time()
        await run(calls)
        return Cost((processor_seconds([pid]) - server) / calls, (time.process_time() - own) / calls)


@asynccontextmanager
async def full_server(bundle: Path) -> AsyncIterator[tuple[str, int]]:
    """Target and process id of a server that refuses every generation."""
    async with server_process(bundle, *_FULL, *_FOREVER) as server, grpc.aio.insecure_channel(server.target) as channel:
        (engine,) = server.engines
        os.kill(engine, signal.SIGSTOP)
        stub = transformer_pb2_grpc.TransformerStub(channel)
        kept = list[grpc.aio.UnaryUnaryCall]()
        try:
            # One by one: of two that come at once the second may be refused though the row is free.
            async with asyncio.timeout(60):
                while not (kept and kept[-1].done()):
                    kept.append(refused(stub))
                    await asyncio.sleep(0.2)
            yield server.target, server.pid
        finally:
            for call in kept:
                call.cancel()
            await asyncio.gather(*kept, return_exceptions=True)
            os.kill(engine, signal.SIGCONT)


@asynccontextmanager
async def bare_server() -> AsyncIterator[tuple[str, int]]:
    """Target and process id of a grpc.aio server with nothing around it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve_bare, args=(there,))
    process.start()
    try:
        port = await asyncio.to_thread(here.recv)
        assert process.pid is not None
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.join()


def serve_bare(parent: Connection) -> None:
    """Tells its port, and serves until it is ended."""

    class Bare(transformer_pb2_grpc.TransformerServicer):
        async def Generate(  # noqa: N802
            self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
        ) -> pb.GenerateResponse:
            await context.abort(_REFUSED, "busy")

        async def Tokenize(  # noqa: N802
            self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse]
        ) -> pb.TokenizeResponse:
            return pb.TokenizeResponse()

    async def serve() -> None:
        server = grpc.aio.server()
        transformer_pb2_grpc.add_TransformerServicer_to_server(Bare(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        parent.send(port)
        await server.wait_for_termination()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Directory made by `python -m export`; without one, a tiny model with random weights."),
    ] = None,
    calls: Annotated[int, typer.Option(min=100, help="Of each kind in each round.")] = 10_000,
    at_once: Annotated[int, typer.Option(min=1, help="Calls in flight.")] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Medians over the rounds, in microseconds of processor time a call."""

    async def run(served: Path) -> dict[tuple[str, str], list[Cost]]:
        found: dict[tuple[str, str], list[Cost]] = {}
        async with full_server(served) as ours, bare_server() as bare:
            for _ in range(rounds):
                for name, call in CALLS.items():
                    for side, (target, pid) in (("this server", ours), ("bare grpc.aio", bare)):
                        found.setdefault((name, side), []).append(await cost(target, pid, call, calls, at_once))
        return found

    with tempfile.TemporaryDirectory() as folder:
        if bundle is None:
            from tests import tiny  # brings torch along

            bundle = tiny.write_bundle(Path(folder) / "tiny", "encoder_decoder")
        found = asyncio.run(run(bundle))
    print(describe_machine())
    print("| call | of | server, µs | caller, µs |\n|---|---|---:|---:|")
    for (name, side), costs in found.items():
        server, caller = (1e6 * statistics.median(part) for part in zip(*((c.server, c.caller) for c in costs), strict=True))
        print(f"| {name} | {side} | {server:.0f} | {caller:.0f} |")


if __name__ == "__main__":
    app(prog_name="python -m tests.bench.call_cost")
