from __future__ import annotations

import random

import pytest

from server.waiting.service_rate import ServiceRate


def test_nothing_is_known_at_first() -> None:
    rate = ServiceRate()
    assert (rate.per_second, rate.seconds_each, rate.most_seconds_each, rate.wait(100)) == (None, None, 0.0, 0.0)


def test_a_few_ends_are_no_measurement() -> None:
    rate = ServiceRate()
    for now in (0.0, *[0.5] * 7):
        rate.ended(now, 0.1, others_wait=True, crowd=True)
    assert rate.per_second is None, "7 intervals"
    rate.ended(0.5, 0.1, others_wait=True, crowd=True)
    assert rate.per_second == 16.0


def test_what_took_no_time_is_no_measurement_either() -> None:
    rate = ServiceRate()
    for _ in range(20):
        rate.ended(1.0, 0.0, others_wait=True, crowd=True)
    assert rate.per_second is None


def test_the_rate_is_that_of_the_time_when_others_waited() -> None:
    rate, now = ServiceRate(), 0.0
    for _ in range(200):  # a request a second comes, and nobody waits
        now += 1.0
        rate.ended(now, 0.05, others_wait=False, crowd=False)
    assert rate.per_second is None
    for _ in range(200):
        now += 0.02
        rate.ended(now, 0.3, others_wait=True, crowd=True)
    assert rate.per_second == pytest.approx(50, rel=0.01)
    assert rate.wait(25) == pytest.approx(0.5, rel=0.01)
    now += 3600  # an hour in which the queue was empty
    rate.ended(now - 3600 + 0.02, 0.3, others_wait=False, crowd=False)
    rate.ended(now, 0.3, others_wait=True, crowd=True)
    assert rate.per_second == pytest.approx(50, rel=0.01)


def test_a_slow_service_has_a_rate_too() -> None:
    rate = ServiceRate()
    for n in range(20):
        rate.ended(60.0 * n, 200.0, others_wait=True, crowd=True)
    assert rate.wait(3) == pytest.approx(180)


def test_it_follows_the_machine() -> None:
    rate, now = ServiceRate(), 0.0
    for seconds in [0.02] * 500 + [0.1] * 200:
        now += seconds
        rate.ended(now, seconds, others_wait=True, crowd=True)
    assert rate.per_second == pytest.approx(10, rel=0.1)
    assert rate.seconds_each == pytest.approx(0.1, rel=0.01)


def test_a_fast_service_is_judged_by_seconds_and_not_by_a_few_ends() -> None:
    rate, now = ServiceRate(), 0.0
    for seconds in [0.02] * 500 + [0.1] * 16:
        now += seconds
        rate.ended(now, seconds, others_wait=True, crowd=True)
    assert rate.per_second is not None
    assert 30 < rate.per_second < 45, "three seconds at 50, one and a half at 10"


def test_few_requests_take_longer_than_is_said() -> None:
    rate, rng = ServiceRate(), random.Random(1)
    for n in range(200):
        rate.ended(float(n), rng.uniform(0.1, 0.5), others_wait=True, crowd=True)
    assert rate.seconds_each == pytest.approx(0.3, abs=0.1)
    assert 0.45 < rate.most_seconds_each < 0.7


def test_what_a_request_takes_is_what_it_takes_in_a_crowd() -> None:
    rate = ServiceRate()
    rate.ended(0.0, 0.05, others_wait=False, crowd=False)
    assert rate.seconds_each == 0.05, "for want of anything better"
    for n in range(100):
        rate.ended(float(n), 0.3, others_wait=True, crowd=True)
    crowded = rate.most_seconds_each
    for n in range(100):  # a quiet night
        rate.ended(1000.0 + n, 0.05, others_wait=False, crowd=False)
    assert rate.most_seconds_each == crowded == pytest.approx(0.3, rel=0.01)
    for n in range(100):  # the machine is slow, and those who would have waited were refused
        rate.ended(2000.0 + n, 0.9, others_wait=False, crowd=True)
    assert rate.seconds_each == pytest.approx(0.9, rel=0.01)
