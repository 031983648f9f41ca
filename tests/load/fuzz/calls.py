"""Mutated requests as calls over gRPC, and the canary: calls whose answers must be the same, to the byte, whatever goes on."""

from __future__ import annotations

import asyncio
import random
import string
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc

from protos import transformer_pb2 as pb
from tests.load.fuzz.mutation import METHODS, Mutated, mutated

SERVICE = METHODS[0].containing_service.full_name
WRONG_STATUSES = frozenset({"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "ABORTED"})
"""The server's own faults: no request may cause one."""
_CALL_SECONDS = 20.0
_CANARY_SECONDS = 120.0
_SHARE_ODD = 0.05
"""Calls with strange metadata, ..."""
_SHARE_LEFT = 0.03
"""... that the caller leaves, or whose deadline is short, ..."""
_SHARE_UNKNOWN = 0.002
"""... or to a method that does not exist."""
_ODD_KEYS = ["x-request-id", "x-tenant", "x-priority", "traceparent", "tracestate", "x-odd", "x-odd-bin", "grpc-tags-bin"]


@dataclass(frozen=True, slots=True)
class Strange:
    """One call and how it ended."""

    number: int
    method: str
    status: str
    details: str

    @property
    def wrong(self) -> bool:
        return self.status in WRONG_STATUSES


def generator(seed: int, number: int) -> random.Random:
    """What one request is drawn from."""
    return random.Random(seed * 2**32 + number)


def request_of(seed: int, number: int) -> Mutated:
    return mutated(generator(seed, number))


async def call(channel: grpc.aio.Channel, seed: int, number: int) -> Strange:
    """Sends request ``number``, in whatever way is drawn for it."""
    rng = generator(seed, number)
    request = mutated(rng)
    name, streams = request.method.name, request.method.server_streaming
    if rng.random() < _SHARE_UNKNOWN:
        name = name[: rng.randrange(len(name))]
    metadata = tuple(_metadata(rng)) if rng.random() < _SHARE_ODD else None
    leaves = rng.random() < _SHARE_LEFT
    timeout = rng.choice([1e-3, 5e-3, 2e-2]) if leaves and rng.random() < 0.5 else _CALL_SECONDS
    path = f"/{SERVICE}/{name}"
    call = (channel.unary_stream if streams else channel.unary_unary)(path)(request.data, timeout=timeout, metadata=metadata)
    if leaves and timeout == _CALL_SECONDS:
        asyncio.get_running_loop().call_later(rng.uniform(0, 0.02), call.cancel)
    try:
        if streams:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return Strange(number, name, str(error.code().name), error.details() or "")
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
        return Strange(number, name, "CANCELLED", "")
    return Strange(number, name, "OK", "")


def _metadata(rng: random.Random) -> AsyncIterator[tuple[str, str | bytes]] | list[tuple[str, str | bytes]]:
    pairs: list[tuple[str, str | bytes]] = []
    for _ in range(rng.randint(1, 4)):
        key = rng.choice(_ODD_KEYS)
        length = rng.choice([0, 1, 16, 55, 129, 1000])
        pairs.append(
            (key, rng.randbytes(length) if key.endswith("-bin") else "".join(rng.choices(string.printable[:94], k=length)))
        )
    return pairs


async def send_all(
    target: str,
    seed: int,
    numbers: range,
    *,
    at_once: int = 64,
    connections: int = 4,
    until: float,
    ended: Callable[[Strange], None],
) -> None:
    """Sends these requests, so many at once, but begins none after ``until`` (``time.monotonic``); each end is told."""
    turns = iter(numbers)
    channels = [grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(connections)]

    async def sender(channel: grpc.aio.Channel) -> None:
        for number in turns:
            if time.monotonic() > until:
                return
            ended(await call(channel, seed, number))

    try:
        await asyncio.gather(*(sender(channels[i % connections]) for i in range(at_once)))
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


_CANARIES: dict[str, bytes] = {
    "Generate": pb.GenerateRequest(
        model="encoder_decoder",
        inputs=[pb.Input(text="abc12")],
        options=pb.GenerationOptions(beams=2, hypotheses=2),
        return_tokens=True,
    ).SerializeToString(),
    "GenerateStream": pb.GenerateRequest(
        model="decoder_only",
        inputs=[pb.Input(text="xy")],
        options=pb.GenerationOptions(max_tokens=8, sampling=pb.Sampling(seed=7)),
        return_tokens=True,
    ).SerializeToString(),
    "Score": pb.ScoreRequest(
        model="encoder_decoder",
        pairs=[pb.ScorePair(source=pb.Input(text="abc"), target=pb.Input(text="de"))],
        return_tokens=True,
    ).SerializeToString(),
    "Classify": pb.ClassifyRequest(model="encoder_only", inputs=[pb.Input(text="abc")]).SerializeToString(),
    "Embed": pb.EmbedRequest(model="encoder_only", inputs=[pb.Input(text="abc")]).SerializeToString(),
    "Tokenize": pb.TokenizeRequest(model="encoder_decoder", texts=["abc"]).SerializeToString(),
    "ListModels": b"",
}


class Canary:
    """A well-behaved caller, who gets the same answers all the time, or is refused when the server is busy."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._expected: dict[str, tuple[bytes, ...]] = {}
        self.songs = self.refused = 0
        self.problems: Counter[str] = Counter()

    async def sing(self) -> None:
        """One call of each method."""
        for method, request in _CANARIES.items():
            try:
                answer = await self._answer(method, request)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    self.refused += 1
                    continue
                self.problems[f"the canary's {method} ended with {error.code().name}: {error.details()}"] += 1
                continue
            if self._expected.setdefault(method, answer) != answer:
                self.problems[f"the canary's {method} was answered otherwise than before"] += 1
        self.songs += 1

    async def _answer(self, method: str, request: bytes) -> tuple[bytes, ...]:
        path = f"/{SERVICE}/{method}"
        if method.endswith("Stream"):
            return joined([piece async for piece in self._channel.unary_stream(path)(request, timeout=_CANARY_SECONDS)])
        return (await self._channel.unary_unary(path)(request, timeout=_CANARY_SECONDS),)


def joined(pieces: Sequence[bytes]) -> tuple[bytes, ...]:
    """A stream of one output: its text, its tokens, its results. How many of them a message brings may change."""
    messages = [pb.GenerateStreamResponse.FromString(piece) for piece in pieces]
    deltas = [message.delta for message in messages if message.HasField("delta")]
    return (
        "".join(delta.text for delta in deltas).encode(),
        *(token.SerializeToString() for delta in deltas for token in delta.tokens),
        *(message.result.SerializeToString() for message in messages if message.HasField("result")),
    )
