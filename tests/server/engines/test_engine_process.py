"""What an engine process tells, and when."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from server.batch.engine import Addressed
from server.batch.step_stats import StepStats
from server.engines import engine_process
from server.engines.engine_process import run
from server.engines.wire import Commands, Report, decode_from_engine, encode
from server.requests import Decoding, Finished, GenerationRequest, TokensReady
from tests.server.step_stats import stats_of

STEP = 0.0004
"""Seconds; two are shorter than what a token may wait, three are longer."""


class OneRequest:
    """An engine for one request at a time, which gets a token in each step and ends after ``max_tokens``."""

    def __init__(self, step_seconds: float) -> None:
        self.now, self._step_seconds = 0.0, step_seconds
        self._request: GenerationRequest | None = None
        self._written = 0

    @property
    def has_work(self) -> bool:
        return self._request is not None

    def submit(self, request: GenerationRequest) -> None:
        self._request, self._written = request, 0

    def cancel(self, request_id: str) -> None:
        if self._request is not None and self._request.id == request_id:
            self._request = None

    def step(self) -> tuple[list[Addressed], StepStats]:
        assert self._request is not None
        request, joined = self._request, (self._request.id,) if not self._written else ()
        self.now += self._step_seconds
        self._written += 1
        events: list[Addressed] = [(request.id, TokensReady(0, (self._written,), (-0.5,)))]
        if self._written == request.decoding.max_tokens:
            events.append((request.id, Finished(())))
            self._request = None
        return events, replace(stats_of(int(self.has_work)), joined=joined)


class Script:
    """The other end: says something before some of the steps, and is gone when it is waited for in vain."""

    def __init__(self, said: dict[int, Commands]) -> None:
        self._said, self._looks = said, itertools.count()
        self.heard: list[Report] = []

    def receive(self, *, wait: bool) -> list[bytes]:
        if (commands := self._said.get(next(self._looks))) is not None:
            return [encode(commands)]
        if wait:
            raise EOFError
        return []

    def send(self, data: bytes) -> None:
        message = decode_from_engine(data)
        assert isinstance(message, Report)
        self.heard.append(message)


def request(tokens: int) -> GenerationRequest:
    return GenerationRequest(id="r", input_ids=(5,), decoding=Decoding(max_tokens=tokens), stream=True)


def steps_in_reports(said: dict[int, Commands], step_seconds: float = STEP) -> list[Report]:
    engine, other_end = OneRequest(step_seconds), Script(said)
    with pytest.raises(EOFError):
        run(engine, other_end, clock=lambda: engine.now)  # type: ignore[arg-type]
    return other_end.heard


def tokens_of(reports: list[Report]) -> Iterator[list[int]]:
    for report in reports:
        yield [token for _, event in report.unwrap() if isinstance(event, TokensReady) for token in event.tokens]


def test_the_first_token_and_the_end_are_told_at_once_and_others_wait_a_millisecond_at_most() -> None:
    reports = steps_in_reports({0: Commands.of([request(9)])})
    assert list(tokens_of(reports)) == [[1], [2, 3, 4], [5, 6, 7], [8, 9]]
    assert [len(report.steps) for report in reports] == [1, 3, 3, 2], "each step is accounted for"
    assert isinstance(reports[-1].unwrap()[-1][1], Finished)
    assert {report.taken for report in reports} == {1}


def test_what_is_said_is_answered_at_once() -> None:
    reports = steps_in_reports({0: Commands.of([request(4)]), 2: Commands.of(["another"])})
    assert [report.taken for report in reports] == [1, 2, 2]
    assert list(tokens_of(reports)) == [[1], [2, 3], [4]], "and takes along what waited"


def test_a_cancellation_that_leaves_nothing_to_do_is_answered_too() -> None:
    reports = steps_in_reports({0: Commands.of([request(9)]), 3: Commands.of(["r"])})
    assert [(report.taken, len(report.steps)) for report in reports] == [(1, 1), (2, 2)]


def test_memory_is_tidied_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    tidied: list[int] = []
    monkeypatch.setattr(engine_process.gc, "collect", lambda: tidied.append(1))
    steps_in_reports({0: Commands.of([request(50)])}, step_seconds=5.0)  # 250 seconds
    assert len(tidied) == 4
