from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import pytest

from server.waiting.admission import Admission, AdmissionLimits, Demand, Forecast, Refused, Tenant, Waiting


def status(requests: int = 0, tokens: int = 0) -> Waiting:
    return Waiting(requests=requests, tokens=tokens)


LIMITS = AdmissionLimits(max_waiting_requests=10, max_waiting_tokens=100, retry_after_seconds=2.5)
SHARED = AdmissionLimits(
    max_waiting_requests=10, max_waiting_tokens=100, tenants={"capped": Tenant(max_waiting=3), "heavy": Tenant(weight=2.0)}
)
UNKNOWN = Forecast(wait=0.0, seconds_each=0.0, per_second=None)


def admit(
    admission: Admission,
    waiting: Waiting,
    requests: int = 1,
    tokens: int = 1,
    forecast: Forecast = UNKNOWN,
    seconds_left: float = 60.0,
    tenant: str = "",
) -> AbstractContextManager[None]:
    return admission.admit(
        Demand(tenant=tenant, requests=requests, tokens=tokens, seconds_left=seconds_left), waiting, forecast
    )


def test_there_is_room_up_to_the_limits() -> None:
    with admit(Admission(LIMITS), status(9, 99)):
        pass


@pytest.mark.parametrize(("waiting", "requests", "tokens"), [(status(9, 0), 2, 2), (status(1, 99), 1, 2)])
def test_beyond_them_a_call_is_refused_with_a_time_to_come_back(waiting: Waiting, requests: int, tokens: int) -> None:
    with pytest.raises(Refused) as refused, admit(Admission(LIMITS), waiting, requests, tokens):
        pass
    assert refused.value.retry_after == 2.5


def test_the_time_to_come_back_is_when_there_will_be_room() -> None:
    forecast = Forecast(wait=1.0, seconds_each=0.1, per_second=4.0)
    with pytest.raises(Refused) as refused, admit(Admission(LIMITS), status(10, 10), 2, 2, forecast):
        pass
    assert refused.value.retry_after == 2 / 4.0
    with pytest.raises(Refused) as refused, admit(Admission(LIMITS), status(5, 100), 1, 20, forecast):
        pass
    assert refused.value.retry_after == 20 * 5 / 100 / 4.0


def test_a_call_larger_than_the_queue_is_admitted_when_nothing_waits() -> None:
    with admit(Admission(LIMITS), status(), 50, 5000):
        pass


def test_a_burst_is_counted_before_it_is_reported() -> None:
    admission = Admission(LIMITS)
    with ExitStack() as handing_over:
        for _ in range(10):
            handing_over.enter_context(admit(admission, status()))
        with pytest.raises(Refused), admit(admission, status()):
            pass
    with admit(admission, status()):
        pass


def test_who_has_handed_over_gives_its_tokens_back_though_others_of_its_tenant_have_not() -> None:
    admission = Admission(LIMITS)
    with admit(admission, status(), 1, 40):
        with admit(admission, status(), 1, 50):
            pass
        with admit(admission, status(), 1, 60):
            pass


def test_a_place_is_given_back_when_the_handover_fails() -> None:
    admission = Admission(LIMITS)
    for _ in range(20):
        with pytest.raises(RuntimeError), admit(admission, status(), 10, 10):
            raise RuntimeError


def test_a_call_that_would_be_late_is_refused_at_once() -> None:
    forecast = Forecast(wait=1.0, seconds_each=0.5, per_second=10.0)
    with admit(Admission(LIMITS), status(5, 5), forecast=forecast, seconds_left=2.0):
        pass  # just in time
    with pytest.raises(Refused), admit(Admission(LIMITS), status(5, 5), forecast=forecast, seconds_left=1.99):
        pass  # the forecast may be wrong by half
    with (
        pytest.raises(Refused, match=r"would take about 1\.5 s, and there are 1 s left") as refused,
        admit(Admission(LIMITS), status(5, 5), forecast=forecast, seconds_left=1.0),
    ):
        pass
    assert refused.value.retry_after == 1.0, "a wait that turns out half as long again would still be in time then"


def test_without_a_wait_no_deadline_is_too_short() -> None:
    with admit(Admission(LIMITS), status(), forecast=Forecast(wait=0.0, seconds_each=9.0, per_second=1.0), seconds_left=0.1):
        pass


def test_a_tenant_has_a_bound_of_its_own() -> None:
    admission, two = Admission(SHARED), Waiting(requests=2, tokens=2, own_requests=2, own_tokens=2)
    with admit(admission, two, tenant="capped"):
        refusal = pytest.raises(Refused, match="this tenant has 3 requests of 3 tokens waiting, and may have 3 of 25")
        with refusal, admit(admission, two, tenant="capped"):
            pass
        with admit(admission, two, tenant="heavy"):
            pass
    with admit(admission, two, tenant="capped"):
        pass


@pytest.mark.parametrize(("tenant", "requests", "tokens"), [("heavy", 5, 50), ("", 3, 25)])
def test_nobody_fills_the_queue_alone(tenant: str, requests: int, tokens: int) -> None:
    """Weights 1, 2 and, for whoever is not named, 1: that share of 10 requests and of 100 tokens, rounded up."""
    full = Waiting(requests=requests, tokens=requests, own_requests=requests, own_tokens=requests)
    with pytest.raises(Refused, match=f"and may have {requests} of {tokens}"), admit(Admission(SHARED), full, tenant=tenant):
        pass
    with admit(Admission(SHARED), Waiting(requests=requests, tokens=requests), tenant="capped"):
        pass  # there is room for the others
    almost = Waiting(requests=requests - 1, tokens=tokens - 1, own_requests=requests - 1, own_tokens=tokens - 1)
    with admit(Admission(SHARED), almost, tokens=1, tenant=tenant):
        pass
    with pytest.raises(Refused), admit(Admission(SHARED), almost, tokens=2, tenant=tenant):
        pass


def test_a_call_larger_than_its_tenants_share_is_admitted_when_nothing_of_it_waits() -> None:
    with admit(Admission(SHARED), Waiting(requests=1, tokens=1), requests=9, tokens=99, tenant="capped"):
        pass


def test_a_stranger_is_one_of_the_others() -> None:
    assert SHARED.tenant("invented-1") == SHARED.tenant("invented-2") == ("", Tenant())
    assert SHARED.tenant("capped") == ("capped", Tenant(max_waiting=3))
