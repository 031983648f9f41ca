"""Attention and the coverage penalty: in the running batch against the reference decoder, and from a caller and back."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from model import decode as reference
from model.alignment import alignment_weights, coverage
from protos import transformer_pb2 as pb
from server.batch import alignment
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.client import CallError, Options, StreamedGeneration, TransformerClient
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.edge.door import Door
from server.engines.in_process import InProcessEngine
from server.requests import (
    Attention,
    Decoding,
    DecodingOptions,
    Finished,
    GenerationRequest,
    InvalidRequest,
    Limits,
    TokensReady,
)
from tests import tiny
from tests.server.batch.requests import expected, random_request, run
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import Running, run_server, served_model

CONFIG = tiny.shape("encoder_decoder")
MODEL = tiny.model(CONFIG)


def engine(precision: str = "fp32", rows: int = 16) -> Engine:
    shape = SequenceShape.from_config(CONFIG.to_dict())
    runtime = SequenceRuntime(tiny.graphs_with_alignment(CONFIG, precision), shape, rows, SessionSettings(threads=1))
    stream = tiny.TOKENIZER.stream
    return Engine(runtime, start_token=1, end_token=2, join_tokens=24, text_stream=stream, align=runtime.align)


def looking(rng: random.Random, plain: GenerationRequest) -> GenerationRequest:
    """The same request, asking for more of the attention, or nothing."""
    decoding = plain.decoding
    if decoding.beams > 1 and rng.random() < 0.6:
        decoding = replace(decoding, coverage_penalty=rng.choice([0.1, 0.5, 2.0]))
    return replace(plain, decoding=decoding, attention=rng.choice(list(Attention)))


def reference_of(request: GenerationRequest) -> list[reference.Hypothesis]:
    d = request.decoding
    if not d.coverage_penalty:
        return expected("encoder_decoder", request)
    return reference.beam_search(
        MODEL,
        request.input_ids,
        beams=d.beams,
        max_tokens=d.max_tokens,
        min_tokens=d.min_tokens,
        length_penalty=d.length_penalty,
        coverage_penalty=d.coverage_penalty,
        patience=d.patience,
    )[: d.hypotheses]


def test_every_kind_of_request_gives_what_the_reference_decoder_gives() -> None:
    rng = random.Random(3)
    requests = [looking(rng, random_request(rng, f"r{i}")) for i in range(120)]
    events = run(engine(), requests, rng)
    for request in requests:
        *deltas, last = events[request.id]
        assert isinstance(last, Finished)
        wanted = reference_of(request)
        assert [list(h.tokens) for h in last.hypotheses] == [h.tokens for h in wanted], request
        for found, want in zip(last.hypotheses, wanted, strict=True):
            if request.decoding.beams > 1:
                assert found.score == pytest.approx(want.score, abs=1e-3)
            weights = alignment_weights(MODEL, request.input_ids, want.tokens).numpy()
            if request.attention is Attention.NONE:
                assert not found.alignment
            else:
                np.testing.assert_allclose(weights[range(len(weights)), found.alignment], weights.max(axis=1), atol=1e-5)
            if request.attention is Attention.WEIGHTS:
                np.testing.assert_allclose(found.attention, weights, atol=1e-5)
            else:
                assert not found.attention
        streamed = [t for delta in deltas if isinstance(delta, TokensReady) and delta.hypothesis == 0 for t in delta.tokens]
        assert not request.stream or streamed == list(last.hypotheses[0].tokens)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_neighbours_change_nothing(precision: str) -> None:
    rng = random.Random(4)
    requests = [looking(rng, random_request(rng, f"r{i}")) for i in range(40)]
    together = run(engine(precision), requests, rng)
    alone = engine(precision)
    for request in requests:
        assert run(alone, [request], rng)[request.id][-1] == together[request.id][-1]


def test_many_long_hypotheses_are_looked_at_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = Decoding(beams=8, hypotheses=8, max_tokens=20, coverage_penalty=0.3)
    request = GenerationRequest(id="r", input_ids=(9, 30, 7, 2), decoding=decoding, attention=Attention.WEIGHTS)
    together = run(engine(), [request], random.Random(0))["r"][-1]
    monkeypatch.setattr(alignment, "_WEIGHTS_TOGETHER", 4 * 20 * 3)
    runtime, sizes = cast(Any, engine().model), list[int]()

    def align(source: Sequence[int], outputs: Sequence[Sequence[int]]) -> list[alignment.Weights]:
        sizes.append(len(outputs))
        return runtime.align(source, outputs)

    plain = [replace(h, alignment=(), attention=()) for h in together.hypotheses]
    completed = alignment.Aligner(align, 1).complete(plain, request)
    for found, want in zip(completed, together.hypotheses, strict=True):
        np.testing.assert_allclose(found.attention, want.attention, atol=1e-6)
    assert len(sizes) > 1
    assert max(sizes) <= 20 * 3 // max(len(h.tokens) for h in plain)


def test_the_best_of_a_coverage_penalty_is_streamed_whatever_ended_first() -> None:
    """Scores without the penalty would send a prefix that its winner does not have."""
    rng = random.Random(5)
    requests = [random_request(rng, f"r{i}") for i in range(200)]
    requests = [
        replace(r, decoding=replace(r.decoding, coverage_penalty=3.0, patience=2.0), stream=True)
        for r in requests
        if r.decoding.beams > 1
    ]
    plain = [replace(r, decoding=replace(r.decoding, coverage_penalty=0.0)) for r in requests]
    covered, uncovered = run(engine(), requests, rng), run(engine(), plain, rng)
    reordered = 0
    for request in requests:
        *deltas, last = covered[request.id]
        assert [t for delta in deltas for t in delta.tokens] == list(last.hypotheses[0].tokens)
        reordered += last.hypotheses[0].tokens != uncovered[request.id][-1].hypotheses[0].tokens
    assert reordered > 10


# From a caller and back


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    tiny.graphs_with_alignment(CONFIG)  # exported before the clock of the server's start runs
    real = InProcessEngine("tiny", lambda: cast(Any, engine()), lambda stats: None)
    limits = Limits(max_inputs=8, max_text_bytes=200, max_input_tokens=24, max_output_tokens=24, max_beams=8)
    facts: dict[str, Any] = {"tokenizer": tiny.TOKENIZER, "vocab_size": tiny.TOKENIZER.vocab_size, "limits": limits}
    async with run_server(served_model(cast(Any, real), name="tiny", can_align=True, **facts)) as running:
        yield running


@pytest.fixture
async def client(running: Running) -> AsyncIterator[TransformerClient]:
    async with TransformerClient(running.target, timeout=20) as client:
        yield client


async def test_callers_get_what_they_ask_for(client: TransformerClient) -> None:
    options = Options(beams=4, hypotheses=3, max_tokens=12, coverage_penalty=0.4, length_penalty=0.6)
    source = tiny.TOKENIZER.encode_source("harbour")
    wanted = reference.beam_search(MODEL, source, beams=4, max_tokens=12, coverage_penalty=0.4, length_penalty=0.6)[:3]
    (plain,) = await client.generate(["harbour"], options)
    (aligned,) = await client.generate(["harbour"], options, attention="alignment")
    (weighed,) = await client.generate(["harbour"], options, attention="weights")
    (*_, last) = [event async for event in client.stream(["harbour"], options, attention="weights")]
    assert isinstance(last, StreamedGeneration)
    assert last.generation == weighed
    for i, want in enumerate(wanted):
        weights = alignment_weights(MODEL, source, want.tokens).numpy()
        assert weighed.hypotheses[i].score == pytest.approx(want.score, abs=1e-3)
        np.testing.assert_allclose(weighed.hypotheses[i].attention, weights, atol=1e-5)
        assert weighed.hypotheses[i].alignment == aligned.hypotheses[i].alignment == tuple(weights.argmax(axis=1).tolist())
        assert replace(aligned.hypotheses[i], alignment=()) == plain.hypotheses[i]
    assert coverage(alignment_weights(MODEL, source, wanted[0].tokens)) < 0

    target = [9, 4, 30, 2]
    (score,) = await client.score([("harbour", target)], attention="weights")
    np.testing.assert_allclose(score.attention, alignment_weights(MODEL, source, target).numpy(), atol=1e-5)
    assert len(score.alignment) == 4
    assert (await client.models())[0].can_align


async def test_what_cannot_be_asked_is_refused(running: Running, client: TransformerClient) -> None:
    with pytest.raises(CallError, match=r"options\.coverage_penalty: ranks hypotheses of a beam search"):
        await client.generate(["a"], Options(beams=1, coverage_penalty=0.2))
    with pytest.raises(CallError, match=r"options\.coverage_penalty: must be between 0 and 10, not -1"):
        await client.generate(["a"], Options(beams=2, coverage_penalty=-1))
    unknown = pb.GenerateRequest(inputs=[pb.Input(text="a")], return_attention=cast(Any, 7))
    with pytest.raises(Exception, match="return_attention: must be ALIGNMENT or WEIGHTS, or absent"):
        await running.stub.Generate(unknown, timeout=5)


async def test_a_model_without_the_graph_says_how_to_get_it() -> None:
    door = Door(served_model(FakeEngine()))
    needs = "needs an encoder-decoder that was exported with --alignment"
    with pytest.raises(InvalidRequest, match=rf"^return_attention: {needs}.*; options\.coverage_penalty: {needs}"):
        options = DecodingOptions(beams=2, coverage_penalty=0.2)
        await door.check_generation("c", ["a"], options, attention=Attention.ALIGNMENT)
    with pytest.raises(InvalidRequest, match=f"^return_attention: {needs}"):
        await door.check_scoring("c", [("a", "b")], attention=Attention.WEIGHTS)


async def test_weights_are_bounded() -> None:
    limits = Limits(max_inputs=200, max_input_tokens=100, max_output_tokens=200, max_beams=16)
    door = Door(served_model(FakeEngine(), limits=limits, can_align=True))
    many = [tuple(range(4, 40)) * 2] * 182  # of 72 tokens, each with an output of 20
    fits = DecodingOptions(max_tokens=20)
    await door.check_generation("c", many, fits, attention=Attention.WEIGHTS)
    await door.check_generation("c", [*many, *many[:10]], fits, attention=Attention.ALIGNMENT)
    complaint = r"^return_attention: may need 263520 weights, more than the limit of 262144: lower max_tokens"
    with pytest.raises(InvalidRequest, match=complaint):
        await door.check_generation("c", [*many, many[0]], fits, attention=Attention.WEIGHTS)
    with pytest.raises(InvalidRequest, match="^return_attention: may need"):
        several = DecodingOptions(max_tokens=20, beams=16, hypotheses=2)
        await door.check_generation("c", many, several, attention=Attention.WEIGHTS)
    with pytest.raises(InvalidRequest, match="^return_attention: may need"):
        await door.check_scoring("c", [(many[0], (5,) * 190)] * 20, attention=Attention.WEIGHTS)
