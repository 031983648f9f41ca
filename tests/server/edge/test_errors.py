from __future__ import annotations

import grpc
import pytest

from server.call import DeadlinePassed, NotReady, Outcome, SlowReader
from server.client import CallError
from server.edge import errors
from server.edge.errors import status_of, verdict_on
from server.edge.fan_out import RequestFailed
from server.models import ModelNotFound, WrongFamily
from server.requests import Failed, Failure, InvalidRequest, Violation
from server.waiting.admission import Refused

EVERY_ERROR: list[Exception] = [
    InvalidRequest([Violation("a", "b")]),
    ModelNotFound("x"),
    WrongFamily("x"),
    Refused("x", 0.25),
    NotReady("x"),
    DeadlinePassed("x"),
    SlowReader("x"),
    *(RequestFailed(Failed(failure, "x")) for failure in Failure),
]


class Answered:
    """A finished call with this status, as client libraries see one."""

    def __init__(self, status: grpc.Status) -> None:
        self.code = lambda: status.code
        self.details = lambda: status.details
        self.trailing_metadata = lambda: status.trailing_metadata


def received(error: Exception) -> CallError:
    return CallError.from_rpc(Answered(status_of(error, "id-1")))


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: f"{type(error).__name__} {error}")
def test_every_error_has_its_line_in_the_table(error: Exception) -> None:
    verdict = verdict_on(error)
    told = received(error)
    assert verdict is not errors._INTERNAL
    assert verdict.outcome is not Outcome.OK
    assert (told.code, told.reason, told.request_id) == (verdict.code, verdict.reason, "id-1")
    assert (told.retry_after is not None) == verdict.retryable


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Failure.CANCELLED, grpc.StatusCode.CANCELLED),
        (Failure.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
        (Failure.OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Failure.SHUTTING_DOWN, grpc.StatusCode.UNAVAILABLE),
        (Failure.NUMERICS, grpc.StatusCode.INTERNAL),
        (Failure.ENGINE, grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_codes_of_engine_failures(failure: Failure, code: grpc.StatusCode) -> None:
    assert verdict_on(RequestFailed(Failed(failure, ""))).code is code


def test_a_refusal_says_when_to_come_back_in_both_languages() -> None:
    status = status_of(Refused("busy", 0.25), "id-1")
    assert ("grpc-retry-pushback-ms", "250") in status.trailing_metadata
    assert received(Refused("busy", 0.25)).retry_after == 0.25
    elsewhere = RequestFailed(Failed(Failure.OVERLOADED, "busy", 0.25))  # refused where the queue is, in another process
    assert ("grpc-retry-pushback-ms", "250") in status_of(elsewhere, "id-1").trailing_metadata


def test_a_replica_that_goes_does_not_push_callers_back_from_the_others() -> None:
    status = status_of(RequestFailed(Failed(Failure.SHUTTING_DOWN, "going")), "id-1")
    assert "grpc-retry-pushback-ms" not in dict(status.trailing_metadata)


@pytest.mark.parametrize("error", [RuntimeError("secret path /etc"), KeyError("secret"), AssertionError("secret")])
def test_what_nobody_expected_tells_nothing_but_the_request_id(error: Exception) -> None:
    told = received(error)
    assert told.code is grpc.StatusCode.INTERNAL
    assert "secret" not in repr(status_of(error, "id-1"))
    assert "id-1" in told.message


def test_a_subclass_of_a_known_error_is_not_mistaken_for_it() -> None:
    class Stranger(WrongFamily):
        pass

    assert verdict_on(Stranger("internals")) is errors._INTERNAL


def test_the_longest_answer_stays_within_8_kib_of_metadata() -> None:
    violations = [Violation(f"inputs[{i}].text", "ü" * 1000) for i in range(256)]
    status = status_of(InvalidRequest(violations), "i" * 128)
    assert sum(len(key) + len(value) * 4 // 3 for key, value in status.trailing_metadata) + 3 * len(status.details) < 8192
