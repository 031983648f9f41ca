from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.waiting.fair_queue import FairQueue, Ticket


def drain(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abcdef":
        queue.put(name, tenant="one", cost=ord(name) % 3 + 1)
    assert drain(queue) == list("abcdef")
    with pytest.raises(IndexError):
        queue.pop()


def test_a_tenant_with_much_does_not_delay_one_with_little() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.put("greedy", tenant="greedy")
    for _ in range(3):
        queue.put("modest", tenant="modest")
    assert Counter(queue.pop() for _ in range(6)) == {"greedy": 3, "modest": 3}


def test_weights_are_shares_of_the_work_and_not_of_the_requests() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(400):
        queue.put("heavy", tenant="heavy", weight=3, cost=2)
        queue.put("light", tenant="light", weight=1, cost=1)
    served = Counter(queue.pop() for _ in range(300))
    assert served["heavy"] * 2 == pytest.approx(3 * served["light"], rel=0.05)


def test_an_idle_tenant_has_saved_up_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.put("busy", tenant="busy")
    for _ in range(40):
        queue.pop()
    for _ in range(10):
        queue.put("late", tenant="late")
    assert Counter(queue.pop() for _ in range(10)) == {"busy": 5, "late": 5}


@pytest.mark.parametrize("kept", [0, 1])
def test_what_was_removed_unserved_is_not_counted_against_its_tenant(kept: int) -> None:
    queue: FairQueue[str] = FairQueue()
    abandoned = [queue.put("unlucky", tenant="unlucky") for _ in range(50)]
    for _ in range(50):
        queue.put("busy", tenant="busy")
    for ticket in abandoned[kept:]:
        queue.remove(ticket)
    for _ in range(10):
        queue.put("unlucky", tenant="unlucky")
    assert Counter(queue.pop() for _ in range(10)) == {"busy": 5, "unlucky": 5}


def test_a_tenant_that_comes_one_by_one_gets_no_more_than_its_share() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(20):
        queue.put("busy", tenant="busy", cost=1)
    queue.put("single", tenant="single", cost=4)
    served: Counter[str] = Counter()
    for _ in range(15):
        served[who := queue.pop()] += 1
        if who == "single":
            queue.put("single", tenant="single", cost=4)
    assert served == {"busy": 12, "single": 3}


def test_turns_stay_in_order_when_many_leave() -> None:
    rng = random.Random(1)
    queue: FairQueue[int] = FairQueue()
    tickets = [queue.put(n, tenant=f"t{n % 300}", cost=rng.randint(1, 99)) for n in range(900)]
    served = {queue.pop() for _ in range(200)}
    left = rng.sample([ticket for ticket in tickets if ticket.waiting], 600)
    for ticket in left:
        assert queue.remove(ticket)
    times = []
    while queue:
        served.add(queue.pop())
        times += [lane.virtual_time for lane in queue._lanes.values()]
    assert times == sorted(times)
    assert served == {ticket.item for ticket in tickets} - {ticket.item for ticket in left}


def test_once_the_queue_has_been_empty_nobody_owes_anything() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("large", tenant="large", cost=100)
    assert drain(queue) == ["large"]
    for name in ("large", "small") * 3:
        queue.put(name, tenant=name)
    assert drain(queue) == ["large", "small"] * 3


def test_whose_last_item_was_large_waits_for_the_others_when_it_comes_again() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("large", tenant="large", cost=3)
    for _ in range(5):
        queue.put("small", tenant="small")
    assert queue.pop() == "large"
    queue.put("large", tenant="large", cost=3)
    assert drain(queue) == ["small", "small", "small", "small", "large", "small"]


def test_priority_comes_before_fairness() -> None:
    queue: FairQueue[str] = FairQueue()
    for name, priority in [("low", -1), ("normal", 0), ("high", 1), ("normal", 0), ("high", 1)]:
        queue.put(name, tenant=name, priority=priority)
    assert drain(queue) == ["high", "high", "normal", "normal", "low"]


def test_who_may_not_go_stands_aside_and_saves_up_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abab" * 4:
        queue.put(name, tenant=name)
    assert [queue.pop(lambda item: item == "b") for _ in range(5)] == ["b"] * 5
    assert drain(queue)[:6] == ["a", "a", "b", "a", "b", "a"], "in turn, and not first all that was held back"


def test_who_may_not_go_does_not_keep_up_the_less_urgent() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("urgent", tenant="a", priority=1)
    queue.put("patient", tenant="b")
    assert queue.pop(lambda item: item != "urgent") == "patient"
    with pytest.raises(IndexError):
        queue.pop(lambda item: False)
    assert drain(queue) == ["urgent"]


def test_what_is_ahead_is_what_the_shares_say() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.put("greedy", tenant="greedy", weight=2)
    assert queue.ahead_of("greedy", weight=2) == 100
    assert queue.ahead_of("modest") == 2
    assert queue.ahead_of("modest", weight=0.01) == 100
    assert queue.ahead_of("urgent", priority=1) == 0
    assert queue.ahead_of("patient", priority=-1) == 100


operations = st.lists(
    st.tuples(st.sampled_from(["put", "put", "pop", "remove"]), st.sampled_from("abc"), st.integers(-1, 1), st.integers(1, 9)),
    max_size=120,
)


@given(operations)
def test_everything_put_in_comes_out_once_or_is_removed_once(steps: list[tuple[str, str, int, int]]) -> None:
    queue: FairQueue[int] = FairQueue()
    inside: dict[int, tuple[Ticket[int], str, int]] = {}
    for number, (what, tenant, priority, cost) in enumerate(steps):
        if what == "put":
            ticket = queue.put(number, tenant=tenant, priority=priority, cost=cost, weight=cost)
            inside[number] = ticket, tenant, priority
        elif what == "pop" and inside:
            item = queue.pop()
            _, whose, urgency = inside.pop(item)
            assert urgency >= max((p for _, _, p in inside.values()), default=-1)
            assert all(item < other for other, (_, t, p) in inside.items() if (t, p) == (whose, urgency))
        elif inside:
            ticket, _, _ = inside.pop(sorted(inside)[cost % len(inside)])
            assert queue.remove(ticket)
            assert not queue.remove(ticket)
        assert len(queue) == len(inside)
        for name in "abc":
            assert queue.waiting_of(name) == sum(t == name for _, t, _ in inside.values())
    assert sorted(queue.pop() for _ in range(len(queue))) == sorted(inside)
