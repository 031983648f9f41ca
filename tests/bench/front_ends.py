"""``python -m tests.bench.front_ends BUNDLE``: streamed tokens and messages a second with 1 and 2 front ends.

Short texts of a small model, so the front end, not the model, is what is measured. Tokens travel together where the front end
is behind the engine, so it is tokens that compare. The callers are processes of this machine and take its cores too: beside the
rates stands the processor time that each kind of process spends on a token, which is what counts where there are cores enough.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer

from protos import transformer_pb2 as pb
from tests.load.running import ServerProcess, server_process

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Round:
    """One stretch of full load."""

    tokens: float
    """A second."""
    messages: float
    """A second: those that bring tokens, and the result of each call."""
    front_ends: float
    """Processor seconds of all processes that take calls, for each token; likewise:"""
    owner: float
    """Of the process that keeps the queue, where that is another."""
    engines: float
    callers: float


async def measure(server: ServerProcess, text: str, tokens: int, seconds: float, callers: int, streams: int) -> Round:
    """Some processes, each with its own connections, keep ``streams`` calls going."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(callers) as pool:

        async def load(seconds: float) -> list[tuple[int, int, float]]:
            one = (server.target, text, tokens, seconds, streams // callers)
            return await asyncio.to_thread(pool.starmap, call, [one] * callers)

        await load(0.5)  # warm, and every process is there
        takers, owners = (server.front_ends, [server.pid]) if server.front_ends else ([server.pid], [])
        before = [processor_seconds(pids) for pids in (takers, owners, server.engines)]
        began = time.perf_counter()
        done = await asyncio.to_thread(
            pool.starmap, call, [(server.target, text, tokens, seconds, streams // callers)] * callers
        )
        elapsed = time.perf_counter() - began
        after = [processor_seconds(pids) for pids in (takers, owners, server.engines)]
    calls, messages, of_callers = (sum(column) for column in zip(*done, strict=True))
    written = calls * tokens
    spent = [(later - earlier) / written for earlier, later in zip(before, after, strict=True)]
    return Round(written / elapsed, messages / elapsed, *spent, of_callers / written)


def call(target: str, text: str, tokens: int, seconds: float, streams: int) -> tuple[int, int, float]:
    """Answered calls of this process, their messages, which are not parsed, and the processor seconds that it took."""
    request = pb.GenerateRequest(
        inputs=[pb.Input(text=text)], options=pb.GenerationOptions(beams=1, max_tokens=tokens, min_tokens=tokens)
    ).SerializeToString()

    async def run() -> tuple[int, int]:
        calls, messages, end = 0, 0, time.perf_counter() + seconds

        async def stream(channel: grpc.aio.Channel) -> None:
            nonlocal calls, messages
            method = channel.unary_stream("/transformer.v1.Transformer/GenerateStream")
            while time.perf_counter() < end:
                async for _ in method(request, timeout=30):
                    messages += 1
                calls += 1

        # Connections of their own, so that the kernel spreads them over the front ends.
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(min(8, streams))]
        await asyncio.gather(*(stream(channels[number % len(channels)]) for number in range(streams)))
        await asyncio.gather(*(channel.close() for channel in channels))
        return calls, messages

    began = time.process_time()
    return *asyncio.run(run()), time.process_time() - began


def processor_seconds(pids: Sequence[int]) -> float:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(own[11]) + int(own[12]) for own in fields) / _TICKS


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="Directory made by `python -m export`, of a small model that generates.")],
    front_ends: Annotated[list[int] | None, typer.Option("--front-ends", help="Default: 1 and 2.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each round.")] = 4.0,
    callers: Annotated[int, typer.Option(min=1, help="Calling processes.")] = 2,
    streams: Annotated[int, typer.Option(min=1, help="Calls in flight.")] = 48,
    text: Annotated[str, typer.Option(help="What is sent.")] = "3. März 2026",
    tokens: Annotated[int, typer.Option(min=1, help="Of each output.")] = 10,
) -> None:
    async def run(count: int) -> list[Round]:
        options = ("--device", "cpu", "--engines", "1", "--threads", "1", "--front-ends", str(count))
        async with server_process(bundle, *options) as server:
            return [await measure(server, text, tokens, seconds, callers, streams) for _ in range(rounds)]

    print("| front ends | tokens/s | messages/s | processor time a token, µs: front ends | queue's owner | engine | callers |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for count in front_ends or (1, 2):
        found = asyncio.run(run(count))
        rates = [ranged([one.tokens for one in found]), ranged([one.messages for one in found])]
        spent = (
            f"{statistics.median(getattr(one, who) for one in found) * 1e6:.0f}"
            for who in ("front_ends", "owner", "engines", "callers")
        )
        print(f"| {count} | {' | '.join([*rates, *spent])} |", flush=True)


def ranged(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


if __name__ == "__main__":
    app(prog_name="python -m tests.bench.front_ends")
