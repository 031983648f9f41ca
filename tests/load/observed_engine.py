"""An engine in the server's own process that is watched from both sides: by whom it is told, and for whom it computes.

It proves what counters cannot show: how many steps a request still gets after its caller has left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable

from server.batch.engine import Addressed, Engine
from server.batch.step_stats import StepStats
from server.engines.in_process import InProcessEngine
from server.engines.stepper import Command, Request, Stepper
from server.requests import Event, TokensReady


class ObservedStepper:
    """A ``Stepper`` in front of another, with books of its own. Lives in the engine's thread, but for ``told``."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._wanted: set[str] = set()
        """Requests that have neither ended nor been cancelled."""
        self._begun = 0
        self._told_at: dict[str, int] = {}
        self.steps_after_leaving: Counter[int] = Counter()
        """Steps that began between the word that a caller had left and the engine's taking note of it, by how many."""
        self.problems: Counter[str] = Counter()

    def told(self, request_id: str) -> None:
        """The front end sends word that the caller has left; a step may be under way."""
        self._told_at[request_id] = self._begun

    @property
    def has_work(self) -> bool:
        return self._stepper.has_work

    def submit(self, request: Request) -> None:
        self._wanted.add(request.id)
        self._stepper.submit(request)

    def cancel(self, request_id: str) -> None:
        self.steps_after_leaving[self._begun - self._told_at.pop(request_id)] += 1
        self._wanted.discard(request_id)
        self._stepper.cancel(request_id)

    def step(self) -> tuple[list[Addressed], StepStats]:
        self._begun += 1
        events, stats = self._stepper.step()
        for request_id, event in events:
            if request_id not in self._wanted:
                self.problems["a token for a request that was cancelled or had ended"] += 1
            if not isinstance(event, TokensReady):
                self._wanted.discard(request_id)
        if isinstance(self._stepper, Engine):
            owners = {group.request.id for group in self._stepper.groups}
            if owners - self._wanted:
                self.problems["rows of a request that was cancelled or had ended"] += 1
        return events, stats


class ObservedEngine(InProcessEngine):
    """Takes the place of the engine that it is given, which has not been started."""

    def __init__(self, engine: InProcessEngine, on_step: Callable[[StepStats], None]) -> None:
        self.stepper: ObservedStepper | None = None

        def build() -> ObservedStepper:
            self.stepper = ObservedStepper(engine._build())
            return self.stepper

        super().__init__(engine.name, build, on_step)

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        return self._in_flight.run(request, self._send)

    def _send(self, command: Command) -> None:
        with self._inbox.changed:  # or this thread might lose the processor between the two
            if isinstance(command, str) and self.stepper is not None:
                self.stepper.told(command)
            self._inbox.put(command)
