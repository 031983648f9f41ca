from __future__ import annotations

from contextlib import ExitStack

import pytest

from server.admission import Admission, AdmissionLimits, Refused
from server.engine_client import EngineStatus


def status(requests: int = 0, tokens: int = 0) -> EngineStatus:
    return EngineStatus(alive=True, live_rows=0, waiting_requests=requests, waiting_tokens=tokens)


LIMITS = AdmissionLimits(max_waiting_requests=10, max_waiting_tokens=100, retry_after_seconds=2.5)


def test_there_is_room_up_to_the_limits() -> None:
    admission = Admission(LIMITS)
    with admission.admit(status(9, 99), requests=1, tokens=1):
        pass


@pytest.mark.parametrize(("waiting", "requests", "tokens"), [(status(9, 0), 2, 2), (status(1, 99), 1, 2)])
def test_beyond_them_a_call_is_refused_with_a_time_to_come_back(waiting: EngineStatus, requests: int, tokens: int) -> None:
    with pytest.raises(Refused) as refused, Admission(LIMITS).admit(waiting, requests=requests, tokens=tokens):
        pass
    assert refused.value.retry_after == 2.5


def test_a_call_larger_than_the_queue_is_admitted_when_nothing_waits() -> None:
    with Admission(LIMITS).admit(status(), requests=50, tokens=5000):
        pass


def test_a_burst_is_counted_before_the_engine_reports_it() -> None:
    admission = Admission(LIMITS)
    with ExitStack() as handing_over:
        for _ in range(10):
            handing_over.enter_context(admission.admit(status(), requests=1, tokens=1))
        with pytest.raises(Refused), admission.admit(status(), requests=1, tokens=1):
            pass
    with admission.admit(status(), requests=1, tokens=1):
        pass


def test_a_place_is_given_back_when_the_handover_fails() -> None:
    admission = Admission(LIMITS)
    for _ in range(20):
        with pytest.raises(RuntimeError), admission.admit(status(), requests=10, tokens=10):
            raise RuntimeError
