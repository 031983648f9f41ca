"""A short form of ``python -m tests.load.storm``, and that it can find what it looks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.batch.engine import Addressed
from server.batch.step_stats import StepStats
from server.config import EnginePlace
from server.engines.stepper import Request
from server.requests import Decoding, GenerationRequest, TokensReady
from tests.load.observed_engine import ObservedStepper
from tests.load.storm import Left, Report, storm
from tests.server.step_stats import stats_of


@pytest.mark.parametrize("place", list(EnginePlace))
@pytest.mark.parametrize("family", ["encoder_decoder", "decoder_only"])
async def test_callers_who_leave_leave_nothing_behind(bundles: dict[str, Path], family: str, place: EnginePlace) -> None:
    report = await storm(bundles[family], 400, place=place, at_once=16, longest=0.15)
    assert report.problems == []
    assert (report.after.rows, report.after.waiting) == (0, 0)
    assert report.wasted_tokens > 0
    assert {"CANCELLED", "DEADLINE_EXCEEDED"} <= report.ends.keys()
    assert report.ends.keys() <= {"CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "OK"}
    assert report.ends.total() == 400
    assert (report.steps_after_leaving.total() > 0) is (place is EnginePlace.IN_PROCESS)


class Deaf:
    """Goes on with what was cancelled."""

    has_work = True

    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...

    def step(self) -> tuple[list[Addressed], StepStats]:
        return [("a", TokensReady(0, (5,), (-0.5,)))], stats_of(0)


def test_an_engine_that_goes_on_is_found() -> None:
    stepper = ObservedStepper(Deaf())
    stepper.submit(GenerationRequest(id="a", input_ids=(5,), decoding=Decoding(max_tokens=9)))
    stepper.step()
    assert not stepper.problems
    stepper.told("a")
    for _ in range(3):
        stepper.step()
    stepper.cancel("a")
    assert stepper.steps_after_leaving == {3: 1}
    stepper.step()
    assert stepper.problems.total() == 1
    nothing = Left(tasks=1, descriptors=1, rows=0, waiting=0)
    report = Report(
        ends=stepper.problems,
        before=nothing,
        after=nothing,
        wasted_tokens=0,
        steps_after_leaving=stepper.steps_after_leaving,
        misdeeds=stepper.problems,
    )
    assert report.problems == [
        "1 times a token for a request that was cancelled or had ended",
        "a request was computed for 3 steps after its caller had left",
    ]
