"""A front end's requests on their way through the process that owns the engines; both ends, with no process between them."""

from __future__ import annotations

import asyncio
from typing import Any

from server.call import Call
from server.engines.wire import unwrap_events, wrap_request
from server.front_ends.desk import Desk
from server.front_ends.front_wire import (
    Answers,
    Handover,
    Orders,
    Withdrawal,
    decode_from_front_end,
    decode_to_front_end,
    encode,
)
from server.requests import Decoding, Event, Failed, Failure, Finished, GenerationRequest, TokensReady
from server.waiting.admission import AdmissionLimits
from server.waiting.waiting_room import WaitingRoom
from tests.server.fake_engine import FakeEngine, hypothesis, says


def request(name: str) -> GenerationRequest:
    return GenerationRequest(id=name, input_ids=(5, 6, 2), decoding=Decoding(max_tokens=4), stream=True)


def handover(*names: str, model: int = 0, **changes: Any) -> Handover:
    call = Call("", "call")
    facts = {
        "request_id": call.request_id,
        "trace": call.trace,
        "tenant": "",
        "priority": 0,
        "started": call.started,
        "longest_seconds": 60.0,
    }
    return Handover(model=model, **{**facts, **changes}, requests=[wrap_request(request(name)) for name in names])


class FrontEndSide:
    """Keeps what a desk sends, as it arrives."""

    def __init__(self) -> None:
        self.messages = 0
        self.events: dict[tuple[int, str], list[Event]] = {}

    def send(self, message: Answers) -> None:
        arrived = decode_to_front_end(encode(message))
        assert isinstance(arrived, Answers)
        self.messages += 1
        for model, events in arrived.events.items():
            for request_id, event in unwrap_events(events):
                self.events.setdefault((model, request_id), []).append(event)


def orders(*items: Handover) -> Orders:
    arrived = decode_from_front_end(encode(Orders(items)))
    assert isinstance(arrived, Orders)
    return arrived


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_events_come_back_under_the_front_ends_own_names_one_message_a_turn() -> None:
    engines = [FakeEngine(), FakeEngine()]
    rooms = [WaitingRoom(engine, AdmissionLimits()) for engine in engines]
    front, other = FrontEndSide(), FrontEndSide()
    desk, twin = Desk("1/", rooms, front.send), Desk("2/", rooms, other.send)
    desk.take(orders(handover("a", "b"), handover("a", model=1)))
    twin.take(orders(handover("a")))  # callers of two front ends may choose the same name
    await settle()
    assert sorted(front.events) == [(0, "a"), (0, "b"), (1, "a")]
    assert [type(event) for event in front.events[0, "a"]] == [TokensReady, TokensReady, Finished]
    assert sorted(other.events) == [(0, "a")]
    assert sorted(one.id for one in engines[0].submitted) == ["1/a", "1/b", "2/a"]
    assert front.messages < sum(map(len, front.events.values()))
    assert desk.in_hand == twin.in_hand == 0


async def test_a_call_that_is_refused_hears_when_to_come_back_and_nothing_of_it_is_computed() -> None:
    engine, front = FakeEngine(), FrontEndSide()
    engine.waiting_requests = engine.waiting_tokens = 9
    desk = Desk("1/", [WaitingRoom(engine, AdmissionLimits(max_waiting_requests=10, retry_after_seconds=3.0))], front.send)
    desk.take(orders(handover("a", "b")))
    await settle()
    assert engine.submitted == []
    for name in ("a", "b"):
        (failed,) = front.events[0, name]
        assert isinstance(failed, Failed)
        assert (failed.failure, failed.retry_after) == (Failure.OVERLOADED, 3.0)
    desk.take(orders(handover("c")))
    await settle()
    assert isinstance(front.events[0, "c"][-1], Finished), "one more fits"


async def test_what_is_withdrawn_or_belongs_to_a_lost_front_end_is_cancelled() -> None:
    gate = asyncio.Event()
    engine, front = FakeEngine(says(gate, Finished((hypothesis((5, 2)),)))), FrontEndSide()
    desk = Desk("1/", [WaitingRoom(engine, AdmissionLimits())], front.send)
    desk.take(orders(handover("a", "b", "c")))
    await settle()
    assert (engine.live, desk.in_hand) == (3, 3)
    desk.take(Orders((Withdrawal(0, "b"), Withdrawal(0, "unknown"))))
    await settle()
    assert engine.closed_early == ["1/b"]
    desk.close()
    await settle()
    assert (engine.live, desk.in_hand) == (0, 0)
    assert front.events == {}


async def test_a_fault_is_an_answer_too() -> None:
    engine, front = FakeEngine(says(RuntimeError("oops"))), FrontEndSide()
    desk = Desk("1/", [WaitingRoom(engine, AdmissionLimits())], front.send)
    desk.take(orders(handover("a")))
    await settle()
    (failed,) = front.events[0, "a"]
    assert isinstance(failed, Failed)
    assert failed.failure is Failure.ENGINE
