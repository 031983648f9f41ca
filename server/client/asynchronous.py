"""The client for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc
from server.client import messages
from server.client.channel import SERVICE, call_metadata, channel_options, checked_priority, checked_timeout
from server.client.errors import CallError
from server.client.resumption import Resumption, reproducible
from server.client.types import (
    Attention,
    Classification,
    Embedding,
    Generation,
    Input,
    ModelInfo,
    Options,
    Score,
    StreamedGeneration,
    StreamedText,
    Tokenization,
)


class TransformerClient:
    """Calls a Transformer service. Every method raises CallError, and only that, for a call that ends without an answer.

    Args:
        target: a gRPC target, for example "localhost:50051" or "dns:///transformer:50051" for all replicas of a name.
        model: the model that calls go to; may be empty when the server has only one.
        timeout: seconds within which each call must end; there are no calls without a deadline.
        watch_health: keep away from replicas that say NOT_SERVING.
        tenant: whose share of the server the calls use, as its operator named it.
        priority: "low", "normal" or "high".

    Raises:
        ValueError: for a timeout that is not above 0 and finite, or an unknown priority.
    """

    def __init__(
        self,
        target: str,
        *,
        model: str = "",
        timeout: float = 30.0,
        watch_health: bool = True,
        tenant: str = "",
        priority: str = "normal",
    ) -> None:
        self._model = model
        self._timeout = checked_timeout(timeout)
        self._metadata = partial(call_metadata, checked_priority(priority), tenant)
        self._channel = grpc.aio.insecure_channel(target, options=channel_options(watch_health=watch_health))
        self._stub = transformer_pb2_grpc.TransformerStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self,
        inputs: Sequence[Input],
        options: Options | None = None,
        *,
        target_prefix: str = "",
        return_tokens: bool = False,
        attention: Attention = "",
        request_id: str = "",
    ) -> tuple[Generation, ...]:
        """One result for each input, in order."""
        request = messages.generate_request(self._model, inputs, options, target_prefix, return_tokens, attention)
        response = await self._call(self._stub.Generate, request, request_id)
        return tuple(map(messages.generation, response.results))

    async def stream(
        self,
        inputs: Sequence[Input],
        options: Options | None = None,
        *,
        target_prefix: str = "",
        return_tokens: bool = False,
        attention: Attention = "",
        request_id: str = "",
    ) -> AsyncIterator[StreamedText | StreamedGeneration]:
        """Text of all inputs as it becomes final, and each input's whole result at its end. Leaving early cancels the call.

        A stream that breaks because its server goes away is taken up again elsewhere, without a gap and without a repetition.
        """
        request = messages.generate_request(self._model, inputs, reproducible(options), target_prefix, return_tokens, attention)
        deadline = time.monotonic() + self._timeout
        resumption = Resumption(deadline)
        while True:
            left = deadline - time.monotonic()
            call = self._stub.GenerateStream(request, timeout=left, metadata=self._metadata(request_id))
            try:
                async for message in call:
                    if (event := resumption.news(messages.streamed(message))) is not None:
                        yield event
                return
            except grpc.RpcError as error:
                pause = resumption.pause_before_retry(CallError.from_rpc(error), time.monotonic())
            finally:
                call.cancel()
            await asyncio.sleep(pause)

    async def classify(self, inputs: Sequence[Input], *, request_id: str = "") -> tuple[Classification, ...]:
        request = pb.ClassifyRequest(model=self._model, inputs=messages.inputs_of(inputs, "inputs"))
        response = await self._call(self._stub.Classify, request, request_id)
        return tuple(map(messages.classification, response.results))

    async def embed(self, inputs: Sequence[Input], *, normalize: bool = False, request_id: str = "") -> tuple[Embedding, ...]:
        request = pb.EmbedRequest(model=self._model, inputs=messages.inputs_of(inputs, "inputs"), normalize=normalize)
        response = await self._call(self._stub.Embed, request, request_id)
        return tuple(map(messages.embedding, response.results))

    async def score(
        self,
        pairs: Sequence[tuple[Input, Input]],
        *,
        return_tokens: bool = False,
        attention: Attention = "",
        request_id: str = "",
    ) -> tuple[Score, ...]:
        """How probable the model finds each (source, target)."""
        request = messages.score_request(self._model, pairs, return_tokens, attention)
        response = await self._call(self._stub.Score, request, request_id)
        return tuple(map(messages.score, response.results))

    async def tokenize(self, texts: Sequence[str], *, request_id: str = "") -> tuple[Tokenization, ...]:
        response = await self._call(self._stub.Tokenize, messages.tokenize_request(self._model, texts), request_id)
        return tuple(map(messages.tokenization, response.results))

    async def models(self, *, request_id: str = "") -> tuple[ModelInfo, ...]:
        response = await self._call(self._stub.ListModels, pb.ListModelsRequest(), request_id)
        return tuple(map(messages.model_info, response.models))

    async def health(self, service: str = SERVICE) -> str:
        """ "SERVING" or "NOT_SERVING". Set ``watch_health=False`` for it: otherwise a NOT_SERVING replica is never asked."""
        check = health_pb2_grpc.HealthStub(self._channel).Check
        response = await self._call(check, health_pb2.HealthCheckRequest(service=service), "")
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    async def _call(self, method: Callable[..., Awaitable[Any]], request: Any, request_id: str) -> Any:
        try:
            return await method(request, timeout=self._timeout, metadata=self._metadata(request_id))
        except grpc.RpcError as error:
            raise CallError.from_rpc(error) from None
