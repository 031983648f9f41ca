from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from model.tokenizer import Tokenizer
from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc
from server.client import CallError
from server.requests import Finished, TokensReady
from tests.server.fake_engine import EOS, FakeEngine, Request, hypothesis, says
from tests.server.run_server import TOKENIZER, Running, run_server, served_model

BYTES = Tokenizer.train_bpe(["plain"], 260)
"""A token for each byte, so that a character needs several."""


def request(*texts: str, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(inputs=[pb.Input(text=text) for text in texts], **fields)  # type: ignore[arg-type]


async def collect(
    running: Running, message: pb.GenerateRequest
) -> tuple[dict[tuple[int, int], str], dict[int, pb.GenerateResult]]:
    """The joined text of each hypothesis of each input, and the results."""
    texts: dict[tuple[int, int], str] = defaultdict(str)
    results: dict[int, pb.GenerateResult] = {}
    async for piece in running.stub.GenerateStream(message, timeout=5):
        if piece.HasField("result"):
            assert piece.input not in results, "one result for each input"
            results[piece.input] = piece.result
        else:
            assert piece.input not in results, "no text after the result"
            texts[piece.input, piece.delta.hypothesis] += piece.delta.text
    return texts, results


async def test_joined_text_is_the_results_text_and_what_generate_says() -> None:
    message = request("3. mai", "a", "wort für wort")
    async with run_server(served_model(FakeEngine())) as running:
        texts, results = await collect(running, message)
        whole = (await running.stub.Generate(message, timeout=5)).results
    assert sorted(results) == [0, 1, 2]
    for position, result in results.items():
        assert texts[position, 0] == result.hypotheses[0].text == whole[position].hypotheses[0].text


@pytest.mark.parametrize("text", ["äöü", "😀€é", "a😀b", "e\u0301"])
async def test_a_character_is_never_split(text: str) -> None:
    model = served_model(FakeEngine(), tokenizer=BYTES, vocab_size=BYTES.vocab_size)
    async with run_server(model) as running:
        deltas = [
            piece.delta.text async for piece in running.stub.GenerateStream(request(text), timeout=5) if piece.HasField("delta")
        ]
    assert "".join(deltas) == text
    assert all("\ufffd" not in delta and delta for delta in deltas)


async def test_what_the_engine_did_not_announce_comes_before_the_result() -> None:
    """A beam search agrees on the rest only when it ends."""
    ids = tuple(TOKENIZER.encode_text("2026-03-03"))
    first = TokensReady(0, ids[:4], (-0.5,) * 4)
    engine = FakeEngine(says(first, Finished((hypothesis((*ids, EOS)), hypothesis(ids[1:])))))
    message = request("x", options=pb.GenerationOptions(beams=2, hypotheses=2), return_tokens=True)
    async with run_server(served_model(engine)) as running:
        pieces = [piece async for piece in running.stub.GenerateStream(message, timeout=5)]
    assert [piece.delta.text for piece in pieces[:-1]] == ["2026", "-03-03"]
    assert [token.id for piece in pieces[:-1] for token in piece.delta.tokens] == [*ids, EOS]
    assert len(pieces[-1].result.hypotheses) == 2


async def test_samples_stream_side_by_side() -> None:
    a, b = (tuple(TOKENIZER.encode_text(text)) for text in ("abc", "xyz"))
    ready = [TokensReady(n, (ids[i],), (-0.5,)) for i in range(3) for n, ids in enumerate((a, b))]
    engine = FakeEngine(says(*ready, Finished((hypothesis((*a, EOS)), hypothesis((*b, EOS))))))
    options = pb.GenerationOptions(hypotheses=2, sampling=pb.Sampling(seed=1))
    async with run_server(served_model(engine)) as running:
        texts, results = await collect(running, request("x", options=options))
    assert texts == {(0, 0): "abc", (0, 1): "xyz"}
    assert results[0].seed == 1


async def test_inputs_interleave_as_they_progress() -> None:
    gate = asyncio.Event()
    ids = tuple(TOKENIZER.encode_text("ab"))

    def script(own: Request):  # type: ignore[no-untyped-def]
        yield TokensReady(0, ids[:1], (-0.5,))
        if own.input_ids[0] == TOKENIZER.encode_text("s")[0]:
            yield gate
        yield Finished((hypothesis(ids),))

    async with run_server(served_model(FakeEngine(script))) as running:
        call = running.stub.GenerateStream(request("slow", "fast"), timeout=5)
        order = []
        async for piece in call:
            order.append((piece.input, piece.WhichOneof("event")))
            if order[-1] == (1, "result"):
                gate.set()
    assert order.index((1, "result")) < order.index((0, "result"))
    assert order.index((0, "delta")) < order.index((1, "result"))


async def test_the_first_text_is_there_before_the_last_is_made() -> None:
    gate = asyncio.Event()
    ids = tuple(TOKENIZER.encode_text("ab"))
    engine = FakeEngine(says(TokensReady(0, ids[:1], (-0.5,)), gate, Finished((hypothesis((*ids, EOS)),))))
    async with run_server(served_model(engine)) as running:
        call = running.stub.GenerateStream(request("x"), timeout=5)
        assert (await call.read()).delta.text == "a"
        gate.set()
        assert (await call.read()).delta.text == "b"
        assert (await call.read()).HasField("result")


def endless(own: Request):  # type: ignore[no-untyped-def]
    """Pieces without end."""
    while True:
        yield TokensReady(0, (5,) * 5000, (-0.5,) * 5000)


@asynccontextmanager
async def narrow(running: Running) -> AsyncIterator[transformer_pb2_grpc.TransformerStub]:
    """A client whose window does not grow, so that it is soon full."""
    async with grpc.aio.insecure_channel(running.target, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        yield transformer_pb2_grpc.TransformerStub(channel)


async def test_a_slow_reader_is_held_back_and_then_ended() -> None:
    made = 0

    def counted(own: Request):  # type: ignore[no-untyped-def]
        nonlocal made
        for event in endless(own):
            made += 1
            yield event

    engine = FakeEngine(counted)
    async with run_server(served_model(engine), write_timeout_seconds=0.3) as running, narrow(running) as stub:
        call = stub.GenerateStream(request("x"), timeout=20)
        await call.read()
        outcome = {"model": "dates", "method": "GenerateStream", "outcome": "deadline"}
        async with asyncio.timeout(5):  # the call is counted a moment after the engine has heard of its end
            while engine.live or running.value("transformer_requests_total", **outcome) is None:
                await asyncio.sleep(0.02)
        assert made < 200, "the engine's iterator waited for the reader"
        assert running.value("transformer_requests_total", **outcome) == 1
        with pytest.raises(grpc.aio.AioRpcError) as error:
            while await call.read() is not grpc.aio.EOF:
                pass
        told = CallError.from_rpc(error.value)
        assert (told.code, told.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_READER")


async def test_a_stalled_reader_does_not_hold_up_others_or_the_stop() -> None:
    engine = FakeEngine()
    async with run_server(served_model(engine), drain_seconds=0.2) as running, narrow(running) as stub:
        engine.script = endless
        stalled = stub.GenerateStream(request("x"), timeout=20)
        await stalled.read()
        engine.script = says(Finished((hypothesis((5,)),)))
        await running.stub.Generate(request("x"), timeout=2)
        running.server.ask_to_stop()
        async with asyncio.timeout(5):
            await running.life
        stalled.cancel()
