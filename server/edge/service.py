"""The gRPC service: each method finds its model, takes the call through the door, and hands its requests to the engine.

Proto messages stop here; nothing in this file knows how an answer is computed, and no error is handled here: whatever is raised
becomes a status in ``server.edge.errors``.
"""

# ruff: noqa: N802 (methods are named as in the proto)
from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import grpc

from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc
from server.call import NotReady, SlowReader, current_call
from server.edge import convert
from server.edge.door import Door
from server.edge.fan_out import EngineBroken, EngineRequest, gather_results, merge_events
from server.metrics import CallMetrics
from server.models import Ability, Models, ServedModel
from server.requests import Encoded, EncodingRequest, Finished, GenerationRequest, TokensReady
from server.waiting.room import Room

Result = TypeVar("Result", Finished, Encoded)

NAME = pb.DESCRIPTOR.services_by_name["Transformer"].full_name

_EVENTS_HELD = 64
"""Per stream, between the engine and a reader that is slower."""
_INLINE_TOKENS = 4096
"""Results with more tokens than this are made into messages in a thread, so that no other call waits for it."""


@dataclass(frozen=True, slots=True)
class _Place:
    """One model, what guards it, and where its requests wait."""

    model: ServedModel
    door: Door
    room: Room


class TransformerService(transformer_pb2_grpc.TransformerServicer):
    """Answers ``transformer.v1.Transformer``; refuses until ``open`` is set."""

    def __init__(
        self, models: Models, rooms: Mapping[str, Room], metrics: CallMetrics, *, write_timeout_seconds: float
    ) -> None:
        self.open = False
        """Set once every engine is warm."""
        self._models = models
        self._places = {model.name: _Place(model, Door(model), rooms[model.name]) for model in models}
        self._metrics = metrics
        self._write_timeout_seconds = write_timeout_seconds

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        place = self._place(request.model, Ability.GENERATE)
        requests = await self._check_generation(place, request)
        results = await self._run(place, requests, Finished)

        def answer() -> pb.GenerateResponse:
            messages = (
                convert.generate_result(finished, own, place.model.tokenizer, return_tokens=request.return_tokens)
                for finished, own in zip(results, requests, strict=True)
            )
            return pb.GenerateResponse(results=messages, model=place.model.name)

        many = self._count_outputs(place, results) > _INLINE_TOKENS
        return await asyncio.to_thread(answer) if many else answer()

    async def GenerateStream(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        place = self._place(request.model, Ability.GENERATE)
        requests = await self._check_generation(place, request, stream=True)
        inputs = [
            convert.StreamedInput(position, own, place.model.tokenizer, return_tokens=request.return_tokens)
            for position, own in enumerate(requests)
        ]
        timer = self._metrics.stream(current_call.get())
        handover = place.room.admit(requests)
        async with aclosing(merge_events(place.room, requests, handover, capacity=_EVENTS_HELD)) as events:
            async for position, event in events:
                if isinstance(event, Encoded):
                    raise EngineBroken("a generation was answered with an encoding")
                if isinstance(event, TokensReady):
                    timer.tokens(position, event.hypothesis, len(event.tokens))
                else:
                    self._count_outputs(place, [event])
                for message in inputs[position].messages(event):
                    await self._write(context, message)

    async def Classify(self, request: pb.ClassifyRequest, context: grpc.aio.ServicerContext) -> pb.ClassifyResponse:
        place = self._place(request.model, Ability.CLASSIFY)
        requests = await self._check_encoding(place, request.inputs)
        results = await self._run(place, requests, Encoded)
        return pb.ClassifyResponse(
            results=(
                convert.classify_result(encoded, place.model.labels, len(own.input_ids))
                for encoded, own in zip(results, requests, strict=True)
            ),
            model=place.model.name,
        )

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        place = self._place(request.model, Ability.EMBED)
        requests = await self._check_encoding(place, request.inputs)
        results = await self._run(place, requests, Encoded)
        return pb.EmbedResponse(
            results=(
                convert.embed_result(encoded, len(own.input_ids), normalize=request.normalize)
                for encoded, own in zip(results, requests, strict=True)
            ),
            model=place.model.name,
        )

    async def Score(self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext) -> pb.ScoreResponse:
        place = self._place(request.model, Ability.SCORE)
        pairs = [(convert.given_input(pair.source), convert.given_input(pair.target)) for pair in request.pairs]
        asked = convert.attention(request.return_attention)
        requests = await place.door.check_scoring(current_call.get().request_id, pairs, attention=asked)
        results = await self._run(place, requests, Finished)
        return pb.ScoreResponse(
            results=(convert.score_result(finished, return_tokens=request.return_tokens) for finished in results),
            model=place.model.name,
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        place = self._place(request.model)
        all_ids = await place.door.tokenize(list(request.texts))
        tokenizer = place.model.tokenizer
        return pb.TokenizeResponse(results=(convert.tokenization(ids, tokenizer) for ids in all_ids), model=place.model.name)

    async def ListModels(self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=(convert.model_message(model) for model in self._models))

    def _place(self, name: str, ability: Ability | None = None) -> _Place:
        """Where a call belongs. Raises NotReady, ModelNotFound, WrongFamily or Refused."""
        if not self.open:
            raise NotReady("the server is starting")
        model = self._models.find(name)
        current_call.get().model = model.name
        if ability is not None:
            model.require(ability)
            self._places[model.name].room.check()
        return self._places[model.name]

    async def _check_generation(
        self, place: _Place, request: pb.GenerateRequest, *, stream: bool = False
    ) -> list[GenerationRequest]:
        return await place.door.check_generation(
            current_call.get().request_id,
            [convert.given_input(one) for one in request.inputs],
            convert.decoding_options(request.options),
            target_prefix=request.target_prefix,
            stream=stream,
            attention=convert.attention(request.return_attention),
        )

    async def _check_encoding(self, place: _Place, inputs: Iterable[pb.Input]) -> list[EncodingRequest]:
        return await place.door.check_encoding(current_call.get().request_id, [convert.given_input(one) for one in inputs])

    async def _run(self, place: _Place, requests: Sequence[EngineRequest], kind: type[Result]) -> list[Result]:
        """The result of each request; the engine must answer with the kind that was asked for."""
        results = await gather_results(place.room, requests, place.room.admit(requests))
        expected = [result for result in results if isinstance(result, kind)]
        if len(expected) != len(requests):
            raise EngineBroken(f"a request was not answered with {kind.__name__}")
        return expected

    def _count_outputs(self, place: _Place, results: Sequence[Finished]) -> int:
        """Tokens of all hypotheses."""
        lengths = [len(hypothesis.tokens) for finished in results for hypothesis in finished.hypotheses]
        self._metrics.outputs_returned(place.model.name, lengths)
        return sum(lengths)

    async def _write(self, context: grpc.aio.ServicerContext, message: pb.GenerateStreamResponse) -> None:
        """Waits for a reader that is slower than the engine, but not for ever."""
        try:
            async with asyncio.timeout(self._write_timeout_seconds):
                await context.write(message)
        except TimeoutError:
            raise SlowReader(f"the stream was not read for {self._write_timeout_seconds:g} s") from None
