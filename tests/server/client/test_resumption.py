"""A stream that breaks goes on elsewhere: no gap, no repetition, and never a mixture of two texts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest

from server.call import current_call
from server.client import (
    CallError,
    Options,
    Sampling,
    StreamedGeneration,
    StreamedText,
    SyncTransformerClient,
    TransformerClient,
)
from server.client import resumption as resumption_module
from server.client.resumption import Resumption, reproducible
from server.client.types import Token
from server.engines.in_flight import STOPPED
from server.requests import GenerationRequest, TokensReady
from tests.server.fake_engine import EOS, FakeEngine, Request, Step, echo
from tests.server.run_server import TOKENIZER, run_server, served_model

GONE = CallError(grpc.StatusCode.UNAVAILABLE, "gone", retry_after=0.0)


class Breaking(FakeEngine):
    """Breaks each of the first streams after some of its tokens."""

    def __init__(self, *after: int, changing: bool = False) -> None:
        super().__init__(self.breaking)
        self.after = list(after)
        self.changing = changing

    def breaking(self, request: Request) -> Iterator[Step]:
        assert isinstance(request, GenerationRequest)
        if self.changing and len(self.submitted) > 1:
            request = replace(request, input_ids=request.input_ids[::-1])
        steps = list(echo(request))
        if self.after:
            yield from [step for step in steps if isinstance(step, TokensReady)][: self.after.pop(0)]
            yield STOPPED
        else:
            yield from steps


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.edge.errors._RETRY_AFTER_SECONDS", 0.01)
    monkeypatch.setattr(resumption_module, "_SHORTEST_PAUSE", 0.01)


async def streamed(client: TransformerClient, **options: bool) -> list[StreamedText | StreamedGeneration]:
    return [event async for event in client.stream(["abcdef"], **options)]


async def test_a_broken_stream_is_taken_up_where_it_broke() -> None:
    engine = Breaking(2, 5, 3)
    async with run_server(served_model(engine)) as running, TransformerClient(running.target, timeout=20) as client:
        events = await streamed(client, return_tokens=True)
    assert len(engine.submitted) == 4
    assert isinstance(events[-1], StreamedGeneration)
    pieces = [event for event in events if isinstance(event, StreamedText)]
    assert "".join(piece.text for piece in pieces) == "abcdef" == events[-1].generation.text
    assert [token.id for piece in pieces for token in piece.tokens] == [*TOKENIZER.encode_text("abcdef"), EOS]


async def test_the_synchronous_client_does_so_too() -> None:
    async with run_server(served_model(Breaking(3))) as running:

        def run() -> list[StreamedText | StreamedGeneration]:
            with SyncTransformerClient(running.target, timeout=20) as client:
                return list(client.stream(["abcdef"]))

        events = await asyncio.to_thread(run)
    assert "".join(event.text for event in events if isinstance(event, StreamedText)) == "abcdef"


async def test_it_is_not_tried_for_ever() -> None:
    engine = Breaking(1, 2, 3, 4, 5, 6)
    async with run_server(served_model(engine)) as running, TransformerClient(running.target, timeout=20) as client:
        with pytest.raises(CallError) as error:
            await streamed(client)
    assert error.value.code is grpc.StatusCode.UNAVAILABLE
    assert len(engine.submitted) == 4


async def test_another_text_is_not_stitched_on() -> None:
    engine = Breaking(3, changing=True)
    async with run_server(served_model(engine)) as running, TransformerClient(running.target, timeout=20) as client:
        with pytest.raises(CallError, match="a second call gave another text"):
            await streamed(client)


def test_what_is_not_retryable_or_too_late_is_raised() -> None:
    begun = Resumption(deadline=10.0)
    begun.news(StreamedText(input=0, hypothesis=0, text="a", tokens=()))
    with pytest.raises(CallError):
        begun.pause_before_retry(CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), now=0.0)
    assert begun.pause_before_retry(CallError(grpc.StatusCode.CANCELLED, "stopping"), now=0.0) > 0
    with pytest.raises(CallError):
        begun.pause_before_retry(CallError(grpc.StatusCode.UNAVAILABLE, "gone", retry_after=5.0), now=6.0)
    with pytest.raises(CallError):
        Resumption(deadline=10.0).pause_before_retry(GONE, now=0.0)
    assert begun.pause_before_retry(GONE, now=0.0) < 1


def test_pieces_may_be_cut_elsewhere_the_second_time() -> None:
    def piece(text: str, at: int = 0) -> StreamedText:
        tokens = tuple(Token(id=ord(character), log_probability=0.0) for character in text)
        return StreamedText(input=at, hypothesis=0, text=text, tokens=tokens)

    stream = Resumption(deadline=10.0)
    first = [stream.news(piece("abc")), stream.news(piece("x", at=1))]
    stream.pause_before_retry(GONE, now=0.0)
    again = [stream.news(piece(text)) for text in ("ab", "cde", "f")] + [stream.news(piece("xy", at=1))]
    pieces = [event for event in first + again if event is not None]
    for at, wanted in enumerate(("abcdef", "xy")):
        own = [event for event in pieces if isinstance(event, StreamedText) and event.input == at]
        assert "".join(event.text for event in own) == wanted
        assert "".join(chr(token.id) for event in own for token in event.tokens) == wanted


def test_sampling_gets_a_seed_before_the_first_call() -> None:
    assert reproducible(None) is None
    assert reproducible(Options(beams=2)) == Options(beams=2)
    assert reproducible(Options(sampling=Sampling(seed=5))) == Options(sampling=Sampling(seed=5))
    drawn = reproducible(Options(sampling=Sampling(temperature=0.5)))
    assert drawn is not None
    assert drawn.sampling is not None
    assert drawn.sampling.temperature == 0.5
    assert drawn.sampling.seed is not None


@pytest.mark.parametrize("options", [{"timeout": 0.0}, {"timeout": float("inf")}, {"timeout": -1.0}, {"priority": "urgent"}])
def test_there_are_no_calls_without_a_deadline(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^(timeout|priority) must be"):
        SyncTransformerClient("localhost:1", **options)  # type: ignore[arg-type]


async def test_tenant_and_priority_reach_the_server() -> None:
    seen = []

    def script(request: Request) -> Iterator[Step]:
        seen.append((current_call.get().tenant, current_call.get().priority))
        yield from echo(request)

    async with run_server(served_model(FakeEngine(script))) as running:
        async with TransformerClient(running.target, tenant="search", priority="high") as client:
            await client.generate(["abc"])
        async with TransformerClient(running.target) as client:
            await client.generate(["abc"])
    assert seen == [("search", 1), ("", 0)]
