"""The generator process: a plan comes in on standard input, one JSON line for each request goes out on standard output.

It is a process of its own, so that neither the report nor the server under test shares its interpreter. A thread paces the
schedule, because an event loop's timer is only good to a millisecond.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

import grpc

from protos import transformer_pb2 as messages
from protos import transformer_pb2_grpc as service

from .ledger import OK, Record
from .plan import Plan

CONNECT_SECONDS = 15.0
HOPELESS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}


class Hopeless(Exception):
    """No request of this plan can succeed."""


class Generator:
    """Sends a plan's requests and keeps a record of each."""

    def __init__(self, plan: Plan, stubs: list[service.TransformerStub]) -> None:
        self._plan = plan
        self._stubs = stubs
        self._start = 0.0
        self._metadata = (("x-tenant", plan.tenant),) if plan.tenant else None
        self.records: list[Record] = []
        count = len(plan.schedule) if plan.schedule is not None else 1
        draw = random.Random(plan.seed)
        self._requests = [self._request(text) for text in plan.texts]
        self._order = [draw.randrange(len(self._requests)) for _ in range(max(count, 4096))]

    async def warm_up(self) -> None:
        """Opens every connection and lets the server see a few requests.

        Raises:
            Hopeless: when the server says that such a request can never succeed.
        """
        for index in range(self._plan.warmup):
            try:
                await self._stub(index).Generate(self._next_request(index), timeout=self._plan.deadline)
            except grpc.aio.AioRpcError as error:
                if error.code() in HOPELESS:
                    raise Hopeless(f"{error.code().name}: {error.details()}") from error

    async def open_loop(self, schedule: list[float]) -> None:
        """Sends each request at its planned time, however many are still unanswered."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        all_sent = asyncio.Event()
        self._start = time.perf_counter() + 0.05

        def send(index: int) -> None:
            task = loop.create_task(self._call(index, schedule[index]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if index == len(schedule) - 1:
                all_sent.set()

        def pace() -> None:
            for index, planned in enumerate(schedule):
                wait = self._start + planned - time.perf_counter()
                if wait > 0:
                    time.sleep(wait)
                loop.call_soon_threadsafe(send, index)

        if schedule:
            threading.Thread(target=pace, name="pacer", daemon=True).start()
            await all_sent.wait()
        while tasks:
            await asyncio.wait(tasks)

    async def closed_loop(self, concurrency: int, seconds: float) -> None:
        """Keeps ``concurrency`` requests in flight: what the server can do at most, not how long anybody waits."""
        self._start = time.perf_counter()
        turn = iter(range(sys.maxsize))

        async def client() -> None:
            while (now := time.perf_counter() - self._start) < seconds:
                await self._call(next(turn), now)

        await asyncio.gather(*(client() for _ in range(concurrency)))

    def _request(self, text: str) -> messages.GenerateRequest:
        options = messages.GenerationOptions(beams=self._plan.beams, max_tokens=self._plan.max_tokens)
        return messages.GenerateRequest(model=self._plan.model, inputs=[messages.Input(text=text)], options=options)

    def _next_request(self, index: int) -> messages.GenerateRequest:
        return self._requests[self._order[index % len(self._order)]]

    def _stub(self, index: int) -> service.TransformerStub:
        return self._stubs[index % len(self._stubs)]

    async def _call(self, index: int, planned: float) -> None:
        request, stub = self._next_request(index), self._stub(index)
        pieces: list[float] = []
        tokens, code = 0, OK
        sent = time.perf_counter() - self._start
        try:
            if self._plan.stream:
                async for message in stub.GenerateStream(request, timeout=self._plan.deadline, metadata=self._metadata):
                    if message.HasField("result"):
                        tokens += _count_tokens(message.result)
                        if pieces:
                            continue
                    pieces.append(time.perf_counter() - self._start)
            else:
                response = await stub.Generate(request, timeout=self._plan.deadline, metadata=self._metadata)
                tokens = sum(_count_tokens(result) for result in response.results)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        done = time.perf_counter() - self._start
        gaps = tuple(round(after - before, 6) for before, after in itertools.pairwise(pieces))
        first = pieces[0] if pieces else None
        self.records.append(Record(planned=planned, sent=sent, first=first, done=done, code=code, tokens=tokens, gaps=gaps))


def _count_tokens(result: messages.GenerateResult) -> int:
    return sum(hypothesis.token_count for hypothesis in result.hypotheses)


async def run(plan: Plan) -> tuple[list[Record], dict[str, Any]]:
    """Carries out the plan.

    Returns:
        The records, in the order of completion, and what else is worth knowing about the stage.

    Raises:
        Hopeless: when the server cannot be reached or can never answer.
    """
    # One HTTP/2 connection each; retries would hide errors and double the load.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0)]
    channels = [grpc.aio.insecure_channel(plan.target, options=options) for _ in range(plan.connections)]
    try:
        try:
            await asyncio.wait_for(asyncio.gather(*(channel.channel_ready() for channel in channels)), CONNECT_SECONDS)
        except TimeoutError as error:
            raise Hopeless(f"no server answers on {plan.target}") from error
        stubs = [service.TransformerStub(channel) for channel in channels]
        generator = Generator(plan, stubs)
        await generator.warm_up()
        model = await _describe_model(stubs[0], plan.model)
        gc.collect()
        gc.freeze()
        gc.disable()
        cpu = time.process_time()
        if plan.schedule is not None:
            await generator.open_loop(plan.schedule)
        else:
            await generator.closed_loop(plan.concurrency or 1, plan.seconds)
        return generator.records, {"cpu_seconds": time.process_time() - cpu, "model": model}
    finally:
        gc.enable()
        for channel in channels:
            await channel.close()


async def _describe_model(stub: service.TransformerStub, name: str) -> str:
    try:
        models = (await stub.ListModels(messages.ListModelsRequest(), timeout=5)).models
    except grpc.aio.AioRpcError:
        return name or "unknown"
    for model in models:
        if name in ("", model.name):
            return f"{model.name} ({model.family}, {model.precision}, {model.device}, {model.parameters:,} parameters)"
    return name or "unknown"


def main() -> int:
    plan = Plan.from_json(sys.stdin.readline())
    try:
        records, facts = asyncio.run(run(plan))
    except Hopeless as reason:
        print(json.dumps({"hopeless": str(reason)}))
        return 1
    except KeyboardInterrupt:
        return 130
    for record in records:
        print(json.dumps(asdict(record)))
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
