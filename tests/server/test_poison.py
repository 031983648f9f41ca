"""Bad input through a real channel: the right code, the field by name, an unharmed service, and an engine that saw nothing."""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from protos import transformer_pb2 as pb
from server.client import CallError
from server.edge import service
from server.requests import Limits
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import TOKENIZER, Running, encoder, run_server, served_model

INVALID, NOT_FOUND, PRECONDITION, EXHAUSTED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
CANARY = pb.GenerateRequest(model="dates", inputs=[pb.Input(text="3. mai")], return_tokens=True)
Options, Sampling = pb.GenerationOptions, pb.Sampling


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with run_server(served_model(FakeEngine()), encoder(FakeEngine())) as running:
        yield running


def generate(*texts: str, **options: Any) -> pb.GenerateRequest:
    inputs = [pb.Input(text=text) for text in texts]
    return pb.GenerateRequest(model="dates", inputs=inputs, options=Options(**options) if options else None)


def tokens(*ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="dates", inputs=[pb.Input(tokens=pb.TokenIds(ids=ids))])


def pairs(source: pb.Input | None, target: pb.Input | None) -> pb.ScoreRequest:
    return pb.ScoreRequest(model="dates", pairs=[pb.ScorePair(source=source, target=target)])


POISON: dict[str, tuple[Any, grpc.StatusCode, str]] = {
    "no inputs": (generate(), INVALID, "inputs"),
    "too many inputs": (generate(*"abcdefghi"), INVALID, "inputs"),
    "empty text": (generate("ok", ""), INVALID, "inputs[1].text"),
    "blank text": (generate(" \t\u2003\n"), INVALID, "inputs[0].text"),
    "text of too many bytes": (generate("ä" * 101), INVALID, "inputs[0].text"),
    "text of too many tokens": (generate("a" * 41), INVALID, "inputs[0].text"),
    "combining marks": (generate("a" + "\u0301" * 100), INVALID, "inputs[0].text"),
    "NUL": (generate("3. mai\0"), INVALID, "inputs[0].text"),
    "neither text nor tokens": (pb.GenerateRequest(model="dates", inputs=[pb.Input()]), INVALID, "inputs[0]"),
    "no token ids": (tokens(), INVALID, "inputs[0].tokens"),
    "too many token ids": (tokens(*[5] * 41), INVALID, "inputs[0].tokens"),
    "a token id beyond the vocabulary": (tokens(5, TOKENIZER.vocab_size), INVALID, "inputs[0].tokens"),
    "a huge token id": (tokens(2**32 - 1), INVALID, "inputs[0].tokens"),
    "zero beams": (generate("a", beams=0), INVALID, "options.beams"),
    "huge beams": (generate("a", beams=2**32 - 1), INVALID, "options.beams"),
    "more hypotheses than beams": (generate("a", beams=2, hypotheses=3), INVALID, "options.hypotheses"),
    "zero hypotheses": (generate("a", hypotheses=0), INVALID, "options.hypotheses"),
    "zero max_tokens": (generate("a", max_tokens=0), INVALID, "options.max_tokens"),
    "huge max_tokens": (generate("a", max_tokens=2**32 - 1), INVALID, "options.max_tokens"),
    "min_tokens above max_tokens": (generate("a", max_tokens=3, min_tokens=4), INVALID, "options.min_tokens"),
    "NaN length penalty": (generate("a", length_penalty=math.nan), INVALID, "options.length_penalty"),
    "infinite length penalty": (generate("a", length_penalty=math.inf), INVALID, "options.length_penalty"),
    "NaN patience": (generate("a", patience=math.nan), INVALID, "options.patience"),
    "zero temperature": (generate("a", sampling=Sampling(temperature=0)), INVALID, "options.sampling.temperature"),
    "NaN temperature": (generate("a", sampling=Sampling(temperature=math.nan)), INVALID, "options.sampling.temperature"),
    "infinite top_p": (generate("a", sampling=Sampling(top_p=math.inf)), INVALID, "options.sampling.top_p"),
    "negative top_p": (generate("a", sampling=Sampling(top_p=-0.5)), INVALID, "options.sampling.top_p"),
    "beams and sampling": (generate("a", beams=2, sampling=Sampling(seed=1)), INVALID, "options.beams"),
    "a target prefix with NUL": (
        pb.GenerateRequest(model="dates", inputs=[pb.Input(text="a")], target_prefix="\0"),
        INVALID,
        "target_prefix",
    ),
    "a target prefix longer than the output": (
        pb.GenerateRequest(model="dates", inputs=[pb.Input(text="a")], target_prefix="a" * 50),
        INVALID,
        "target_prefix",
    ),
    "no pairs": (pb.ScoreRequest(model="dates"), INVALID, "pairs"),
    "a pair without a target": (pairs(pb.Input(text="a"), None), INVALID, "pairs[0].target"),
    "a pair with a blank source": (pairs(pb.Input(text=" "), pb.Input(text="a")), INVALID, "pairs[0].source.text"),
    "a target of too many tokens": (pairs(pb.Input(text="a"), pb.Input(text="a" * 50)), INVALID, "pairs[0].target.text"),
    "no texts": (pb.TokenizeRequest(model="dates"), INVALID, "texts"),
    "a blank text to tokenise": (pb.TokenizeRequest(model="dates", texts=["a", ""]), INVALID, "texts[1]"),
    "nothing to classify": (pb.ClassifyRequest(model="mood"), INVALID, "inputs"),
    "empty text to embed": (pb.EmbedRequest(model="mood", inputs=[pb.Input(text="")]), INVALID, "inputs[0].text"),
    "an unknown model": (pb.GenerateRequest(model="dat\nes" * 1000, inputs=[pb.Input(text="a")]), NOT_FOUND, "model"),
    "no model named where there are two": (pb.GenerateRequest(inputs=[pb.Input(text="a")]), NOT_FOUND, "model"),
    "classifying with a translator": (pb.ClassifyRequest(model="dates", inputs=[pb.Input(text="a")]), PRECONDITION, "model"),
    "embedding with a translator": (pb.EmbedRequest(model="dates", inputs=[pb.Input(text="a")]), PRECONDITION, "model"),
    "generating with an encoder": (pb.GenerateRequest(model="mood", inputs=[pb.Input(text="a")]), PRECONDITION, "model"),
    "scoring with an encoder": (pb.ScoreRequest(model="mood"), PRECONDITION, "model"),
}


@pytest.mark.parametrize("name", POISON)
async def test_a_poisoned_message_is_refused_by_field(running: Running, name: str) -> None:
    request, code, field = POISON[name]
    before = (await running.stub.Generate(CANARY, timeout=5)).SerializeToString(deterministic=True)
    submitted = engine_work(running)

    error = await refusal(running, type(request).__name__.removesuffix("Request"), request.SerializeToString())

    assert error.code is code
    assert [violation.field for violation in error.violations] == [field]
    assert error.violations[0].description
    assert error.message == f"{field}: {error.violations[0].description}"
    assert len(error.message) < 200
    assert error.message.isprintable()
    assert error.callers_fault
    assert engine_work(running) == submitted
    assert (await running.stub.Generate(CANARY, timeout=5)).SerializeToString(deterministic=True) == before


WIRE: dict[str, bytes] = {
    "text that is not UTF-8": b"\x12\x06\x0a\x04\xff\xfe\xfd\xfc",
    "half a surrogate pair": b"\x12\x05\x0a\x03\xed\xa0\x80",
    "garbage": bytes(range(255, 0, -1)),
    "a length beyond the end": b"\x12\xff\xff\xff\xff\x0f",
    "an endless varint": b"\x80" * 20,
    "nesting without end": b"\x12\x80\x02" * 200,
    "a truncated message": CANARY.SerializeToString()[:-3],
}


@pytest.mark.parametrize("name", WIRE)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_bytes_that_are_no_message_are_refused(running: Running, method: str, name: str) -> None:
    before = (await running.stub.Generate(CANARY, timeout=5)).SerializeToString(deterministic=True)
    error = await refusal(running, method, WIRE[name])
    assert error.code is INVALID
    assert [violation.field for violation in error.violations] == ["request"]
    assert error.reason == "INVALID_REQUEST"
    assert (await running.stub.Generate(CANARY, timeout=5)).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("service_name", ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"])
async def test_the_health_service_refuses_garbage_too(running: Running, service_name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in running.channel.unary_stream(f"/{service_name}")(b"\xff\xff", timeout=5):
            pass
    assert error.value.code() is INVALID


async def test_unknown_fields_and_enum_values_are_ignored(running: Running) -> None:
    expected = (await running.stub.Generate(CANARY, timeout=5)).SerializeToString(deterministic=True)
    unknown = b"\xf8\x07\x63" + b"\xfa\x3f\x03abc" + b"\xb9\x3e" + struct.pack("<d", math.nan)
    call = running.channel.unary_unary(f"/{service.NAME}/Generate")
    assert pb.GenerateResponse.FromString(
        await call(CANARY.SerializeToString() + unknown, timeout=5)
    ) == pb.GenerateResponse.FromString(expected)


async def test_a_message_beyond_the_limit_is_refused(running: Running) -> None:
    error = await refusal(running, "Generate", generate("a" * 9_000_000).SerializeToString())
    assert error.code is EXHAUSTED
    assert engine_work(running) == 0
    await running.stub.Generate(CANARY, timeout=5)


async def test_metadata_beyond_the_limit_is_refused(running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await running.stub.Generate(CANARY, timeout=5, metadata=(("x-much", "x" * 100_000),))
    assert error.value.code() is EXHAUSTED
    assert engine_work(running) == 0
    await running.stub.Generate(CANARY, timeout=5)


async def test_details_of_many_violations_stay_within_what_clients_accept() -> None:
    limits = Limits(max_inputs=256, max_text_bytes=200, max_input_tokens=40, max_output_tokens=50)
    async with run_server(served_model(FakeEngine(), limits=limits)) as running:
        error = await refusal(running, "Generate", generate(*[""] * 256).SerializeToString())
    assert error.code is INVALID
    assert [violation.field for violation in error.violations] == [*(f"inputs[{i}].text" for i in range(8)), "request"]
    assert error.violations[-1].description == "248 more fields are invalid"


async def refusal(running: Running, method: str, data: bytes) -> CallError:
    """Whatever the method's kind, its first answer is its status."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in running.channel.unary_stream(f"/{service.NAME}/{method}")(data, timeout=5):
            pass
    return CallError.from_rpc(error.value)


def engine_work(running: Running) -> int:
    return sum(running.value("transformer_request_input_tokens_count", model=name) or 0 for name in ("dates", "mood"))
