from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import AsyncIterator

import grpc
import pytest

from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc
from server.client import (
    CallError,
    FieldViolation,
    Options,
    Sampling,
    StreamedGeneration,
    StreamedText,
    SyncTransformerClient,
    TransformerClient,
)
from server.client.channel import SERVICE_CONFIG
from server.edge.service import NAME
from server.requests import Failed, Failure
from tests.server.fake_engine import EOS, FakeEngine, says
from tests.server.run_server import TOKENIZER, Running, encoder, run_server, served_model


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with run_server(served_model(FakeEngine()), encoder(FakeEngine())) as running:
        yield running


@pytest.fixture
async def client(running: Running) -> AsyncIterator[TransformerClient]:
    async with TransformerClient(running.target, model="dates", timeout=5) as client:
        yield client


@pytest.fixture
async def mood(running: Running) -> AsyncIterator[TransformerClient]:
    async with TransformerClient(running.target, model="mood", timeout=5) as client:
        yield client


async def test_generate(client: TransformerClient) -> None:
    first, second = await client.generate(["3. mai", TOKENIZER.encode_text("ab")])
    assert (first.text, second.text) == ("3. mai", "ab")
    assert first.input_token_count == 7
    assert first.seed is None
    assert first.hypotheses[0].finish_reason == "end_of_text"
    assert first.hypotheses[0].tokens == ()


async def test_options_and_n_best(client: TransformerClient) -> None:
    (result,) = await client.generate(["abc"], Options(beams=4, hypotheses=2), return_tokens=True)
    assert [h.text for h in result.hypotheses] == ["abc", "bc"]
    assert result.hypotheses[1].probability == pytest.approx(0.2231, abs=1e-4)
    assert [token.id for token in result.hypotheses[1].tokens][-1] == EOS


async def test_sampling_returns_the_seed(client: TransformerClient) -> None:
    results = await client.generate(["a", "b"], Options(sampling=Sampling(seed=0, temperature=0.5)))
    assert [result.seed for result in results] == [0, 1]


async def test_stream(client: TransformerClient) -> None:
    events = [event async for event in client.stream(["abc"])]
    texts = [event.text for event in events if isinstance(event, StreamedText)]
    assert texts == ["a", "b", "c"]
    assert isinstance(events[-1], StreamedGeneration)
    assert events[-1].generation.text == "abc"


async def test_leaving_a_stream_early_cancels_it() -> None:
    never = asyncio.Event()
    engine = FakeEngine()

    def script(request):  # type: ignore[no-untyped-def]
        yield from list(FakeEngine().script(request))[:1]
        yield never

    engine.script = script
    async with run_server(served_model(engine)) as running, TransformerClient(running.target) as client:
        stream = client.stream(["abc"])
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(2):
            while engine.live:
                await asyncio.sleep(0.005)


async def test_score_and_tokenize(client: TransformerClient) -> None:
    (score,) = await client.score([("ab", "cd")], return_tokens=True)
    assert (score.log_probability, score.token_count, len(score.tokens)) == (-1.5, 3, 3)
    (tokens,) = await client.tokenize(["ab"])
    assert tokens.pieces == ("a", "b", "</s>")


async def test_classify_and_embed(mood: TransformerClient) -> None:
    (classified,) = await mood.classify(["abc"])
    assert (classified.label, [c.probability for c in classified.classes]) == ("good", [0.75, 0.25])
    (embedded,) = await mood.embed(["abc"], normalize=True)
    assert embedded.vector == pytest.approx((0.6, 0.8))


async def test_models_and_health(client: TransformerClient) -> None:
    dates, mood = await client.models()
    assert dates.default_options == Options(
        beams=1, hypotheses=1, length_penalty=1.0, max_tokens=50, min_tokens=0, patience=1.0
    )
    assert mood.default_options == Options()
    assert mood.labels == ("bad", "good")
    assert dates.limits.max_beams == 4
    assert await client.health() == await client.health("") == "SERVING"


async def test_an_error_says_everything(client: TransformerClient) -> None:
    with pytest.raises(CallError) as error:
        await client.generate(["ok", " "], request_id="mine-1")
    told = error.value
    assert str(told) == "INVALID_ARGUMENT: inputs[1].text: must not be empty or blank"
    assert told.violations == (FieldViolation("inputs[1].text", "must not be empty or blank"),)
    assert (told.reason, told.request_id, told.retry_after, told.callers_fault) == ("INVALID_REQUEST", "mine-1", None, True)
    with pytest.raises(CallError) as streamed:
        async for _ in client.stream([]):
            pass
    assert streamed.value.violations[0].field == "inputs"


@pytest.mark.parametrize(
    ("inputs", "field"),
    [(["ok", "half \ud83d"], "inputs[1].text"), ([[1, -1]], "inputs[0].tokens"), ([[2**40]], "inputs[0].tokens")],
)
async def test_what_protobuf_cannot_carry_is_refused_by_field(
    client: TransformerClient, inputs: list[str | list[int]], field: str
) -> None:
    with pytest.raises(CallError) as error:
        await client.generate(inputs)
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.value.violations] == [field]


async def test_options_protobuf_cannot_carry_are_refused(client: TransformerClient) -> None:
    with pytest.raises(CallError, match="^INVALID_ARGUMENT: options: "):
        await client.generate(["a"], Options(beams=-1))


async def test_one_text_is_not_a_list_of_texts(client: TransformerClient) -> None:
    with pytest.raises(TypeError, match="a list of texts, not one text"):
        await client.generate("3. mai")


async def test_nobody_there() -> None:
    async with TransformerClient("127.0.0.1:1", timeout=3) as client:
        with pytest.raises(CallError) as error:
            await client.generate(["a"])
    assert error.value.code is grpc.StatusCode.UNAVAILABLE
    assert (error.value.callers_fault, error.value.request_id) == (False, "")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_call_that_a_replica_did_not_serve_is_made_again(code: grpc.StatusCode) -> None:
    """As a server's core ends calls that it had not looked at when it stopped."""

    class Going(transformer_pb2_grpc.TransformerServicer):
        calls = 0

        async def Tokenize(  # noqa: N802 (as in the proto)
            self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
        ) -> pb.TokenizeResponse:
            self.calls += 1
            if self.calls == 1:
                await context.abort(code, "not here")
            return pb.TokenizeResponse(results=[pb.Tokenization(ids=[7], pieces=["a"])])

    server, service = grpc.aio.server(), Going()
    transformer_pb2_grpc.add_TransformerServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with TransformerClient(f"127.0.0.1:{port}", timeout=10, watch_health=False) as client:
            (result,) = await client.tokenize(["a"])
        assert (service.calls, list(result.ids)) == (2, [7])
    finally:
        await server.stop(0)


async def test_every_call_has_a_deadline() -> None:
    engine = FakeEngine(says(asyncio.Event()))
    async with run_server(served_model(engine)) as running, TransformerClient(running.target, timeout=0.2) as client:
        with pytest.raises(CallError) as error:
            await client.generate(["a"])
        assert error.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(CallError):
            async for _ in client.stream(["a"]):
                pass
    assert inspect.signature(TransformerClient).parameters["timeout"].default == 30.0


@pytest.mark.parametrize("failure", [Failure.SHUTTING_DOWN, Failure.ENGINE])
async def test_a_replica_that_goes_is_left_for_another_unary_and_stream(failure: Failure) -> None:
    engine, tries = FakeEngine(), 0

    def script(request):  # type: ignore[no-untyped-def]
        nonlocal tries
        tries += 1
        return FakeEngine().script(request) if tries % 3 == 0 else [Failed(failure, "gone")]

    engine.script = script
    async with run_server(served_model(engine)) as running, TransformerClient(running.target, timeout=5) as client:
        (result,) = await client.generate(["ab"])
        assert (result.text, tries) == ("ab", 3)
        events = [event async for event in client.stream(["ab"])]
        assert isinstance(events[-1], StreamedGeneration)
        assert tries == 6


async def test_an_overloaded_server_is_not_tried_again_but_says_when() -> None:
    engine = FakeEngine()
    engine.waiting_requests = 10_000
    async with run_server(served_model(engine)) as running, TransformerClient(running.target, timeout=5) as client:
        with pytest.raises(CallError) as error:
            await client.generate(["ab"])
        assert (error.value.reason, error.value.retry_after) == ("OVERLOADED", 1.0)
        rejected = {"model": "dates", "method": "Generate", "outcome": "rejected"}
        assert running.value("transformer_requests_total", **rejected) == 1


async def test_calls_turn_away_from_a_replica_that_says_not_serving() -> None:
    dead = FakeEngine()
    async with (
        run_server(served_model(dead)) as going,
        run_server(served_model(FakeEngine())) as staying,
        TransformerClient(f"ipv4:{going.target},{staying.target}", timeout=5) as client,
    ):
        for _ in range(10):
            await client.generate(["ab"])
        dead.alive = False
        while going.server.serving:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        before = len(dead.submitted)
        assert before > 0, "round robin"
        for _ in range(10):
            await client.generate(["ab"])
        assert len(dead.submitted) == before


def test_the_service_config_is_about_our_service() -> None:
    (method,) = SERVICE_CONFIG["methodConfig"]
    assert method["name"] == [{"service": NAME}]
    assert json.loads(json.dumps(SERVICE_CONFIG)) == SERVICE_CONFIG


async def test_the_synchronous_client_does_the_same(running: Running) -> None:
    def everything() -> None:
        with SyncTransformerClient(running.target, model="dates", timeout=5) as client:
            assert client.generate(["ab"])[0].text == "ab"
            assert [event.text for event in client.stream(["ab"]) if isinstance(event, StreamedText)] == ["a", "b"]
            assert client.score([("ab", "cd")])[0].token_count == 3
            assert client.tokenize(["ab"])[0].pieces == ("a", "b", "</s>")
            assert [model.name for model in client.models()] == ["dates", "mood"]
            assert client.health() == "SERVING"
            with pytest.raises(CallError, match=r"^INVALID_ARGUMENT: inputs\[0\]\.text: "):
                client.generate([""])
            with pytest.raises(CallError, match="^FAILED_PRECONDITION: model: 'dates'"):
                client.classify(["a"])
            with pytest.raises(CallError, match="^INVALID_ARGUMENT: inputs: "):
                list(client.stream([]))
        with SyncTransformerClient(running.target, model="mood", timeout=5) as client:
            assert client.classify(["a"])[0].label == "good"
            assert client.embed(["a"])[0].vector == (3.0, 4.0)

    await asyncio.to_thread(everything)


def test_both_clients_have_the_same_methods_and_words() -> None:
    def public(kind: type) -> dict[str, tuple[list[str], str | None]]:
        methods = {name: member for name, member in vars(kind).items() if inspect.isfunction(member) and name[0] != "_"}
        return {name: (list(map(str, inspect.signature(m).parameters.values())), m.__doc__) for name, m in methods.items()}

    assert public(TransformerClient) == public(SyncTransformerClient)
    assert str(inspect.signature(TransformerClient)) == str(inspect.signature(SyncTransformerClient))


def test_the_client_needs_neither_the_engine_nor_its_libraries() -> None:
    check = "import sys, server.client; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.split())
    assert {name for name in modules if name.split(".")[0] in ("onnxruntime", "torch", "numpy", "tokenizers", "model")} == set()
    ours = {name for name in modules if name.startswith("server.")}
    assert all(name.startswith("server.client") for name in ours), ours
