"""Callers as a service has them every day, for a load that goes on for long."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc

LEAVING = 0.1
"""Share of calls whose caller leaves, or has hardly any time."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_CALL_SECONDS = 60.0
_REST_SECONDS = 0.05
"""After the last call of many, for the server to put it away."""
_CALLS_OF_A_CHANNEL = 200
"""Before it is closed and another opened: connections come and go, too."""


class Callers:
    """Who calls a service in the course of a day: patient ones, readers of streams, some who are wrong, some who leave.

    Args:
        target: of the server, HOST:PORT.
        leaving: share of calls whose caller leaves after 1 to 50 ms, or gives them no more time than that.
        seed: fixes what is asked.
    """

    def __init__(self, target: str, leaving: float, seed: int) -> None:
        self._target, self._leaving, self._random = target, leaving, random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self._made = 0
        self._channel = self._open()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self.statuses: Counter[str] = Counter()
        """How calls ended, by the name of their code."""

    async def come(self, rate: float) -> None:
        """``rate`` calls a second (Poisson) until cancelled."""
        due = time.monotonic()
        while True:
            due = max(due + self._random.expovariate(rate), time.monotonic() - 1)  # no burst after a time of being frozen
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self._wanted.wait()
            task = asyncio.create_task(self.call())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            self._made += 1
            if self._made % _CALLS_OF_A_CHANNEL == 0:
                await self.renew()

    async def call(self) -> None:
        """One, to its end."""
        self.statuses[await self._status()] += 1

    async def renew(self) -> None:
        """Opens another connection; the old one closes when its calls have ended."""
        old, self._channel = self._channel, self._open()
        closing = asyncio.create_task(old.close(grace=_CALL_SECONDS))
        if not self._running:
            await closing
            await self._channel.channel_ready()
            return
        self._running.add(closing)
        closing.add_done_callback(self._running.discard)

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Nobody calls: a call in flight takes tens of kilobytes, far more than what is looked for."""
        self._wanted.clear()
        try:
            while self._running:
                await asyncio.wait(self._running)
                await asyncio.sleep(_REST_SECONDS)
            yield
        finally:
            self._wanted.set()

    async def leave(self) -> None:
        """The last call has ended, and one connection is left."""
        await asyncio.gather(*self._running)
        await self.renew()

    async def close(self) -> None:
        await self._channel.close()

    def _open(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._target, options=[("grpc.use_local_subchannel_pool", 1)])

    async def _status(self) -> str:
        draw, stub = self._random, transformer_pb2_grpc.TransformerStub(self._channel)
        kind, leaves = draw.random(), draw.random()
        timeout = draw.uniform(0.001, 0.05) if leaves < self._leaving / 2 else _CALL_SECONDS
        try:
            if kind < 0.4:
                call = stub.Generate(self._generation(), timeout=timeout)
            elif kind < 0.8:
                call = stub.GenerateStream(self._generation(), timeout=timeout)
            elif kind < 0.9:
                source, target = pb.Input(text=self._text()), pb.Input(text=self._text())
                call = stub.Score(pb.ScoreRequest(pairs=[pb.ScorePair(source=source, target=target)]), timeout=timeout)
            elif kind < 0.95:
                call = stub.Tokenize(pb.TokenizeRequest(texts=[self._text()]), timeout=timeout)
            else:
                call = stub.Generate(pb.GenerateRequest(), timeout=timeout)
            if leaves >= 1 - self._leaving / 2:
                asyncio.get_running_loop().call_later(draw.uniform(0.001, 0.05), call.cancel)
            if 0.4 <= kind < 0.8:
                async for _ in call:
                    pass
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            return "CANCELLED"
        return "OK"

    def _generation(self) -> pb.GenerateRequest:
        draw = self._random
        options = pb.GenerationOptions(beams=draw.choice([1, 1, 2]))
        if draw.random() < 0.2:
            options = pb.GenerationOptions(sampling=pb.Sampling(seed=draw.randrange(2**32)), no_repeat_ngram=3)
        inputs = [pb.Input(text=self._text()) for _ in range(draw.choice([1, 1, 3]))]
        return pb.GenerateRequest(inputs=inputs, options=options, return_tokens=draw.random() < 0.3)

    def _text(self) -> str:
        return "".join(self._random.choices(_LETTERS, k=self._random.randint(1, 12)))
