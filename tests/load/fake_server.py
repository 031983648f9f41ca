"""A Transformer service without a model: answers each call after a fixed time, and can be made to stall."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from protos import transformer_pb2 as messages
from protos import transformer_pb2_grpc as service

RESULT = messages.GenerateResult(hypotheses=[messages.Hypothesis(text="2026-03-03", token_count=3)])


class FakeTransformer(service.TransformerServicer):
    """Streams two pieces, ``pause`` apart; ``gate`` is what everybody waits at."""

    def __init__(self, pause: float = 0.005) -> None:
        self.pause = pause
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls = 0
        self.fail_every: int | None = None

    async def Generate(  # noqa: N802
        self, request: messages.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> messages.GenerateResponse:
        if request.model not in ("", "fake"):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model named {request.model!r}")
        await self.gate.wait()
        await asyncio.sleep(self.pause)
        return messages.GenerateResponse(results=[RESULT], model="fake")

    async def GenerateStream(  # noqa: N802
        self, request: messages.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[messages.GenerateStreamResponse]:
        self.calls += 1
        if self.fail_every and self.calls % self.fail_every == 0:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
        await self.gate.wait()
        for text in ("2026-", "03-03"):
            await asyncio.sleep(self.pause)
            yield messages.GenerateStreamResponse(delta=messages.Delta(text=text))
        yield messages.GenerateStreamResponse(result=RESULT)

    async def ListModels(  # noqa: N802
        self, request: messages.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> messages.ListModelsResponse:
        return messages.ListModelsResponse(
            models=[messages.Model(name="fake", family="encoder_decoder", precision="fp32", device="cpu", parameters=7)]
        )


@asynccontextmanager
async def serve(fake: FakeTransformer) -> AsyncIterator[str]:
    """Runs the fake on a free port of the loopback address; yields HOST:PORT."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service.add_TransformerServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)
