"""Who joins and when: first come, first served, within rows and tokens, and nobody starves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batch.scheduler import Company, Scheduler
from server.requests import Decoding, GenerationRequest


def request(name: str, tokens: int, rows: int = 1) -> GenerationRequest:
    return GenerationRequest(id=name, input_ids=(5,) * tokens, decoding=Decoding(max_tokens=4, beams=rows))


def names(joining: list) -> list[str]:
    return [waiting.request.id for waiting in joining]


def queue(scheduler: Scheduler) -> list[str]:
    return names(list(scheduler))


def test_they_join_in_the_order_of_their_arrival() -> None:
    scheduler = Scheduler(join_tokens=100)
    for i in range(4):
        scheduler.add(request(f"r{i}", 10), now=float(i))
    joining = scheduler.schedule(free_rows=3)
    assert names(joining) == ["r0", "r1", "r2"]
    assert [waiting.since for waiting in joining] == [0.0, 1.0, 2.0]
    assert queue(scheduler) == ["r3"]


def test_a_wide_request_is_not_overtaken_by_narrow_ones() -> None:
    scheduler = Scheduler(join_tokens=100)
    scheduler.add(request("wide", 5, rows=8), now=0.0)
    scheduler.add(request("narrow", 5, rows=1), now=0.0)
    assert scheduler.schedule(free_rows=7) == []
    assert names(scheduler.schedule(free_rows=8)) == ["wide"]
    assert names(scheduler.schedule(free_rows=1)) == ["narrow"]


def test_the_budget_bounds_what_joins_in_one_step() -> None:
    scheduler = Scheduler(join_tokens=20)
    for name, tokens in (("a", 12), ("b", 8), ("c", 1)):
        scheduler.add(request(name, tokens), now=0.0)
    assert names(scheduler.schedule(free_rows=9)) == ["a", "b"]
    assert names(scheduler.schedule(free_rows=9)) == ["c"]


def test_one_input_longer_than_the_budget_goes_alone() -> None:
    scheduler = Scheduler(join_tokens=20)
    for name, tokens in (("short", 3), ("long", 50), ("next", 1)):
        scheduler.add(request(name, tokens), now=0.0)
    assert names(scheduler.schedule(free_rows=9)) == ["short"]
    assert names(scheduler.schedule(free_rows=9)) == ["long"]
    assert names(scheduler.schedule(free_rows=9)) == ["next"]
    scheduler.add(request("late", 1), now=0.0)
    assert scheduler.schedule(free_rows=9, budget=0) == []


def test_a_request_can_be_withdrawn_once() -> None:
    scheduler = Scheduler(join_tokens=20)
    scheduler.add(request("a", 7), now=0.0)
    assert scheduler.remove("a")
    assert scheduler.remove("a") is False
    assert scheduler.remove("b") is False
    assert (len(scheduler), scheduler.waiting_tokens) == (0, 0)


@given(st.data())
def test_the_queue_through_any_traffic(data: st.DataObject) -> None:
    join_tokens = data.draw(st.integers(1, 20), label="join_tokens")
    scheduler = Scheduler(join_tokens)
    waiting: list[GenerationRequest] = []  # what the queue must hold
    for number in range(data.draw(st.integers(1, 25), label="actions")):
        action = data.draw(st.sampled_from(["add", "add", "schedule", "remove"]))
        if action == "add":
            new = request(
                f"r{number}", data.draw(st.integers(1, 30), label="tokens"), data.draw(st.integers(1, 6), label="rows")
            )
            scheduler.add(new, now=0.0)
            waiting.append(new)
        elif action == "remove" and waiting:
            gone = waiting.pop(data.draw(st.integers(0, len(waiting) - 1), label="which"))
            assert scheduler.remove(gone.id)
        elif action == "schedule":
            free = data.draw(st.integers(0, 8), label="free rows")
            joining = names(scheduler.schedule(free))
            joined, waiting = waiting[: len(joining)], waiting[len(joining) :]
            assert joining == [r.id for r in joined]  # the head of the queue, in order: nobody is overtaken
            assert sum(r.decoding.rows for r in joined) <= free
            tokens = sum(len(r.input_ids) for r in joined)
            assert tokens <= join_tokens or len(joined) == 1
            if waiting:  # whoever is left at the head did not fit
                head = waiting[0]
                rows_left, tokens_left = free - sum(r.decoding.rows for r in joined), join_tokens - tokens
                assert head.decoding.rows > rows_left or (joined and len(head.input_ids) > tokens_left)
        assert queue(scheduler) == [r.id for r in waiting]
        assert len(scheduler) == len(waiting)
        assert scheduler.waiting_tokens == sum(len(r.input_ids) for r in waiting)


def test_what_fits_stays_in_the_queue_until_it_is_scheduled() -> None:
    scheduler = Scheduler(join_tokens=20)
    for name, tokens in (("a", 12), ("b", 8), ("c", 1)):
        scheduler.add(request(name, tokens), now=0.0)
    assert names(scheduler.fitting(free_rows=9)) == ["a", "b"]
    assert queue(scheduler) == ["a", "b", "c"]
    assert scheduler.waiting_tokens == 21
    assert names(scheduler.schedule(free_rows=9)) == ["a", "b"]


def test_who_holds_nobody_up_waits_for_nobody() -> None:
    assert Company().is_complete(1, now=5.0, held_up=0.0, gap=1.0)


def test_they_wait_together_as_long_as_they_would_hold_up_the_others() -> None:
    company = Company()
    assert not company.is_complete(1, now=10.0, held_up=6.0, gap=1.0)
    assert not company.is_complete(3, now=13.0, held_up=6.0, gap=1.0)  # one has waited for 3 s
    assert company.is_complete(3, now=14.0, held_up=6.0, gap=1.0)  # and three for 1 s each
    assert not company.is_complete(1, now=20.0, held_up=6.0, gap=1.0)  # what was waited before is paid
    assert not company.is_complete(1, now=25.5, held_up=6.0, gap=1.0)
    assert company.is_complete(1, now=26.0, held_up=6.0, gap=1.0)


def test_time_in_which_nobody_waits_does_not_count() -> None:
    company = Company()
    assert company.is_complete(0, now=1.0, held_up=6.0, gap=1.0)  # nobody is there to wait
    assert not company.is_complete(1, now=100.0, held_up=6.0, gap=1.0)
    assert company.is_complete(0, now=103.0, held_up=6.0, gap=1.0)  # it was cancelled, and with it what it had waited
    assert not company.is_complete(1, now=200.0, held_up=6.0, gap=1.0)
    assert not company.is_complete(1, now=204.0, held_up=6.0, gap=1.0)


def test_nobody_waits_for_company_that_is_not_expected_in_time() -> None:
    assert Company().is_complete(1, now=1.0, held_up=6.0, gap=6.0)
    company = Company()
    assert not company.is_complete(1, now=1.0, held_up=6.0, gap=2.5)
    assert not company.is_complete(2, now=2.0, held_up=6.0, gap=2.5)
    assert company.is_complete(3, now=2.0, held_up=6.0, gap=2.5)  # three would each wait for the fourth


def test_the_gap_is_that_of_the_last_arrivals_and_grows_while_nobody_comes() -> None:
    scheduler = Scheduler(join_tokens=20)
    assert scheduler.gap(0.0) == math.inf
    for at in (0.0, 10.0, 20.0):
        scheduler.add(request(f"r{at}", 1), now=at)
    assert scheduler.gap(30.0) == 10.0
    assert scheduler.gap(60.0) == 20.0
    for at in range(8):
        scheduler.add(request(f"s{at}", 1), now=100.0 + at)
    assert scheduler.gap(108.0) == 1.0


@pytest.mark.parametrize(("every", "held_up"), [(1.0, 8.0), (1.0, 32.0), (0.25, 5.0), (1.0, 0.5), (4.0, 3.5)])
def test_waiting_costs_little_more_than_the_best_that_could_be_done(every: float, held_up: float) -> None:
    """Sources come at a steady rate; each encoding costs the others ``held_up``, and each second of waiting costs one."""
    company, arrived, spent = Company(), list[float](), 0.0
    step, duration = 1 / 64, 2048
    for now in (step * i for i in range(int(duration / step))):
        if now % every == 0.0:
            arrived.append(now)
        if company.is_complete(len(arrived), now, held_up, every) and arrived:
            spent += held_up + sum(now - at for at in arrived)
            arrived.clear()
    best = min(held_up / size + every * (size - 1) / 2 for size in range(1, 40)) * duration / every
    assert spent <= 1.2 * best
