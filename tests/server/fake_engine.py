"""An ``EngineClient`` that says what its script says, and remembers what was asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from server.engines.engine_client import Changed, EngineStatus
from server.requests import (
    Encoded,
    EncodingRequest,
    Event,
    Failed,
    Failure,
    Finished,
    FinishReason,
    GenerationRequest,
    Hypothesis,
    TokensReady,
)

EOS = 2

Request = GenerationRequest | EncodingRequest
Step = Event | asyncio.Event | BaseException
"""What a script holds: an event to emit, something to wait for, or something to raise."""
Script = Callable[[Request], Iterable[Step]]


class FakeEngine:
    """Answers by ``script``; set a new one at any time."""

    def __init__(self, script: Script | None = None, most: int | None = None) -> None:
        """Args: most: requests that have rows at once; None: all."""
        self.script: Script = script or echo
        self.most = most
        self.submitted: list[Request] = []
        self.closed_early: list[str] = []
        """Ids of requests whose iterator was closed before its last event."""
        self.present: list[str] = []
        """Ids of requests that have not ended, in order."""
        self._with_rows: set[str] = set()
        self.alive = True
        self.waiting_requests = 0
        self.waiting_tokens = 0
        self.warm = asyncio.Event()
        self.warm.set()
        self.drains: list[float] = []
        self.listeners: list[Changed] = []
        self._draining = False

    async def start(self) -> None:
        await self.warm.wait()

    async def submit(self, request: Request) -> AsyncIterator[Event]:
        if self._draining:
            yield Failed(Failure.SHUTTING_DOWN, "the server is shutting down")
            return
        self.submitted.append(request)
        self.present.append(request.id)
        self._report()
        ended = False
        try:
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, BaseException):
                    raise step
                else:
                    if not isinstance(step, TokensReady):
                        ended = True
                        self._leave(request.id)
                    yield step
        finally:
            if not ended:
                self.closed_early.append(request.id)
                self._leave(request.id)

    @property
    def live(self) -> int:
        return len(self.present)

    def _leave(self, request_id: str) -> None:
        self.present.remove(request_id)
        self._report()

    def _report(self) -> None:
        """As an engine does after a step: before anybody has read what it says."""
        had_rows, self._with_rows = self._with_rows, set(self.present[: self.most])
        joined = [request_id for request_id in self.present[: self.most] if request_id not in had_rows]
        for changed in self.listeners:
            changed(joined)

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(
            alive=self.alive,
            live_rows=self.live,
            live_requests=self.live,
            waiting_requests=self.waiting_requests,
            waiting_tokens=self.waiting_tokens,
        )

    def listen(self, changed: Changed) -> None:
        self.listeners.append(changed)

    async def drain(self, timeout: float) -> None:
        self._draining = True
        self.drains.append(timeout)
        async with asyncio.timeout(timeout):
            while self.live:
                await asyncio.sleep(0.005)


def echo(request: Request) -> Iterable[Step]:
    """The input again, token by token; each further hypothesis is shorter by one token. Classes and vectors are fixed."""
    if isinstance(request, EncodingRequest):
        yield Encoded((0.25, 0.75), (3.0, 4.0))
        return
    written = request.forced or tuple(i for i in request.input_ids if i != EOS)
    if not request.forced_only:
        written = (*written[: request.decoding.max_tokens - 1], EOS)
    if request.stream:
        for token in written[:-1]:
            yield TokensReady(0, (token,), (-0.5,))
    count = request.decoding.alternatives or request.decoding.hypotheses
    yield Finished(tuple(hypothesis(written[n:] or (EOS,)) for n in range(count)))


def hypothesis(tokens: tuple[int, ...]) -> Hypothesis:
    total = -0.5 * len(tokens)
    return Hypothesis(
        tokens=tokens,
        log_probabilities=(-0.5,) * len(tokens),
        log_probability=total,
        score=total / max(1, len(tokens)),
        finish_reason=FinishReason.END_OF_TEXT if tokens[-1:] == (EOS,) else FinishReason.LENGTH,
    )


def says(*steps: Step) -> Script:
    """The same script for every request."""
    return lambda request: steps
