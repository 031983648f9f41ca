"""Every method through a real channel."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from protos import transformer_pb2 as pb
from server.client import CallError
from server.edge import service
from server.requests import Encoded, Finished
from tests.server.fake_engine import EOS, FakeEngine, hypothesis, says
from tests.server.run_server import TOKENIZER, Running, encoder, run_server, served_model

DATES = pb.DESCRIPTOR.services_by_name["Transformer"]


def text(*values: str) -> list[pb.Input]:
    return [pb.Input(text=value) for value in values]


async def test_every_declared_method_is_served() -> None:
    async with run_server(served_model(FakeEngine())) as running:
        for method in DATES.methods:
            call = running.channel.unary_stream(f"/{service.NAME}/{method.name}")(b"", timeout=5)
            try:
                async for _ in call:
                    pass
            except grpc.aio.AioRpcError as error:
                assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION), method.name


async def test_an_unknown_method_is_unimplemented() -> None:
    async with run_server(served_model(FakeEngine())) as running:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await running.channel.unary_unary(f"/{service.NAME}/Destroy")(b"", timeout=5)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_generate_answers_each_input_in_order() -> None:
    async with run_server(served_model(FakeEngine())) as running:
        response = await running.stub.Generate(pb.GenerateRequest(inputs=text("one", "two", "three")), timeout=5)
    assert [result.hypotheses[0].text for result in response.results] == ["one", "two", "three"]
    assert [result.input_token_count for result in response.results] == [4, 4, 6]
    assert response.model == "dates"
    first = response.results[0]
    assert not first.HasField("seed")
    assert not first.hypotheses[0].tokens
    assert first.hypotheses[0].finish_reason == pb.FINISH_REASON_END_OF_TEXT


async def test_generate_returns_hypotheses_and_tokens_when_asked() -> None:
    request = pb.GenerateRequest(
        inputs=text("abc"), options=pb.GenerationOptions(beams=3, hypotheses=2), return_tokens=True, model="dates"
    )
    async with run_server(served_model(FakeEngine())) as running:
        (result,) = (await running.stub.Generate(request, timeout=5)).results
    assert [h.text for h in result.hypotheses] == ["abc", "bc"]
    assert [token.id for token in result.hypotheses[1].tokens] == [*TOKENIZER.encode_text("bc"), EOS]
    assert result.hypotheses[1].token_count == 3
    assert result.hypotheses[1].log_probability == -1.5


async def test_options_reach_the_engine_as_the_decimals_that_were_written() -> None:
    engine = FakeEngine()
    options = pb.GenerationOptions(beams=4, length_penalty=0.6, max_tokens=9, min_tokens=2, patience=1.3)
    async with run_server(served_model(engine)) as running:
        await running.stub.Generate(pb.GenerateRequest(inputs=text("a"), options=options), timeout=5)
    (request,) = engine.submitted
    assert request.decoding.length_penalty == 0.6  # type: ignore[union-attr]
    assert request.decoding.patience == 1.3  # type: ignore[union-attr]
    assert request.decoding.beams == 4  # type: ignore[union-attr]


async def test_the_lowest_temperature_written_as_a_decimal_is_accepted() -> None:
    options = pb.GenerationOptions(sampling=pb.Sampling(temperature=0.01, seed=5))
    async with run_server(served_model(FakeEngine())) as running:
        response = await running.stub.Generate(pb.GenerateRequest(inputs=text("a"), options=options), timeout=5)
    assert response.results[0].seed == 5


async def test_input_i_alone_with_its_returned_seed_is_the_same_request() -> None:
    engine = FakeEngine()

    def sampled(*values: str, seed: int | None = None) -> pb.GenerateRequest:
        return pb.GenerateRequest(inputs=text(*values), options=pb.GenerationOptions(sampling=pb.Sampling(seed=seed)))

    async with run_server(served_model(engine)) as running:
        both = await running.stub.Generate(sampled("ab", "cd"), timeout=5)
        assert both.results[1].seed == both.results[0].seed + 1
        await running.stub.Generate(sampled("cd", seed=both.results[1].seed), timeout=5)
    _, second, alone = engine.submitted
    assert second.decoding == alone.decoding  # type: ignore[union-attr]


async def test_several_inputs_are_several_concurrent_engine_requests() -> None:
    engine, gate = FakeEngine(), asyncio.Event()
    engine.script = lambda request: [gate, Finished((hypothesis(request.input_ids),))]
    async with run_server(served_model(engine)) as running:
        call = running.stub.Generate(pb.GenerateRequest(inputs=text("a", "b", "c")), timeout=5)
        while engine.live < 3:
            await asyncio.sleep(0.005)
        gate.set()
        assert len((await call).results) == 3


async def test_score_sums_over_the_forced_target() -> None:
    pairs = [pb.ScorePair(source=pb.Input(text="ab"), target=pb.Input(text="cde"))]
    engine = FakeEngine()
    async with run_server(served_model(engine)) as running:
        (scored,) = (await running.stub.Score(pb.ScoreRequest(pairs=pairs, return_tokens=True), timeout=5)).results
    assert (scored.log_probability, scored.token_count) == (-2.0, 4)
    assert [token.id for token in scored.tokens] == [*TOKENIZER.encode_text("cde"), EOS]
    assert engine.submitted[0].forced_only  # type: ignore[union-attr]


async def test_classify_names_classes_most_probable_first() -> None:
    async with run_server(encoder(FakeEngine())) as running:
        (result,) = (await running.stub.Classify(pb.ClassifyRequest(inputs=text("abc")), timeout=5)).results
    assert [(c.label, c.probability) for c in result.classes] == [("good", 0.75), ("bad", 0.25)]
    assert result.input_token_count == 4


@pytest.mark.parametrize(("normalize", "expected"), [(False, [3.0, 4.0]), (True, [0.6, 0.8])])
async def test_embed(normalize: bool, expected: list[float]) -> None:
    async with run_server(encoder(FakeEngine())) as running:
        response = await running.stub.Embed(pb.EmbedRequest(inputs=text("abc"), normalize=normalize), timeout=5)
    assert list(response.results[0].vector) == pytest.approx(expected)


async def test_a_vector_of_zeros_stays_one_when_normalised() -> None:
    async with run_server(encoder(FakeEngine(says(Encoded((), (0.0, 0.0)))))) as running:
        response = await running.stub.Embed(pb.EmbedRequest(inputs=text("abc"), normalize=True), timeout=5)
    assert list(response.results[0].vector) == [0.0, 0.0]


async def test_tokenize_shows_what_the_model_is_fed() -> None:
    async with run_server(served_model(FakeEngine())) as running:
        (result,) = (await running.stub.Tokenize(pb.TokenizeRequest(texts=["ab"]), timeout=5)).results
    assert list(result.ids) == [*TOKENIZER.encode_text("ab"), EOS]
    assert list(result.pieces) == ["a", "b", "</s>"]


async def test_list_models_shows_limits_defaults_and_certificates() -> None:
    async with run_server(served_model(FakeEngine()), encoder(FakeEngine())) as running:
        dates, mood = (await running.stub.ListModels(pb.ListModelsRequest(), timeout=5)).models
    assert (dates.name, dates.family, dates.fingerprint) == ("dates", "encoder_decoder", "f" * 64)
    assert (dates.limits.max_beams, dates.default_options.max_tokens) == (4, 50)
    assert dates.parity_certificate == '{"passed": true}'
    assert list(mood.labels) == ["bad", "good"]
    assert not mood.HasField("default_options")


async def test_with_several_models_a_call_must_name_one() -> None:
    async with run_server(served_model(FakeEngine()), encoder(FakeEngine())) as running:
        named = await running.stub.Classify(pb.ClassifyRequest(model="mood", inputs=text("a")), timeout=5)
        assert named.model == "mood"
        error = await failure(running, pb.ClassifyRequest(inputs=text("a")))
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert error.message == "model: must be named, because this server has several: dates, mood"


async def test_a_result_of_many_tokens_is_whole() -> None:
    long = Finished(tuple(hypothesis((5,) * 2000) for _ in range(3)))
    async with run_server(served_model(FakeEngine(says(long)))) as running:
        response = await running.stub.Generate(pb.GenerateRequest(inputs=text("a"), return_tokens=True), timeout=5)
    assert [len(h.tokens) for h in response.results[0].hypotheses] == [2000] * 3


async def test_results_do_not_depend_on_concurrent_calls() -> None:
    async def one(running: Running, value: str) -> str:
        response = await running.stub.Generate(pb.GenerateRequest(inputs=text(value)), timeout=10)
        return str(response.results[0].hypotheses[0].text)

    values = [f"{i} mai {i * i}" for i in range(100)]
    async with run_server(served_model(FakeEngine())) as running:
        assert await asyncio.gather(*(one(running, value) for value in values)) == values


async def failure(running: Running, request: Any) -> CallError:
    method = type(request).__name__.removesuffix("Request")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await getattr(running.stub, method)(request, timeout=5)
    return CallError.from_rpc(error.value)
