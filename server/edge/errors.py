"""What a caller is told when a call fails: one table from what went wrong to a gRPC status.

This is the only place where status codes are chosen. Whatever is not in the table is a fault of the server: the caller learns
the request id and nothing else, the log has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from server.call import REQUEST_ID, DeadlinePassed, NotReady, Outcome, SlowReader
from server.edge.fan_out import RequestFailed
from server.models import ModelNotFound, WrongFamily
from server.requests import Failure, InvalidRequest, Violation
from server.waiting.admission import Refused

DOMAIN = "transformer.v1"
"""Of google.rpc.ErrorInfo: who speaks."""
PUSHBACK = "grpc-retry-pushback-ms"
"""Metadata key by which gRPC clients that retry are told when."""

# Details travel as metadata, of which many clients accept 8 KiB.
_MAX_VIOLATIONS = 8
_MAX_DESCRIPTION = 200
_MAX_MESSAGE = 400


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the table."""

    code: grpc.StatusCode
    outcome: Outcome
    reason: str
    """Of google.rpc.ErrorInfo: for programs to tell apart what shares a code."""
    retryable: bool = False
    """The same call may succeed later or on another replica; RetryInfo says when."""


_BY_FAILURE = {
    Failure.CANCELLED: Verdict(grpc.StatusCode.CANCELLED, Outcome.CANCELLED, "CANCELLED"),
    Failure.DEADLINE: Verdict(grpc.StatusCode.DEADLINE_EXCEEDED, Outcome.DEADLINE, "DEADLINE"),
    Failure.OVERLOADED: Verdict(grpc.StatusCode.RESOURCE_EXHAUSTED, Outcome.REJECTED, "OVERLOADED", retryable=True),
    Failure.SHUTTING_DOWN: Verdict(grpc.StatusCode.UNAVAILABLE, Outcome.REJECTED, "SHUTTING_DOWN", retryable=True),
    Failure.NUMERICS: Verdict(grpc.StatusCode.INTERNAL, Outcome.FAILED, "NUMERICS"),
    Failure.ENGINE: Verdict(grpc.StatusCode.UNAVAILABLE, Outcome.FAILED, "ENGINE", retryable=True),
}
_BY_TYPE: dict[type[Exception], Verdict] = {
    InvalidRequest: Verdict(grpc.StatusCode.INVALID_ARGUMENT, Outcome.INVALID, "INVALID_REQUEST"),
    ModelNotFound: Verdict(grpc.StatusCode.NOT_FOUND, Outcome.NOT_FOUND, "MODEL_NOT_FOUND"),
    WrongFamily: Verdict(grpc.StatusCode.FAILED_PRECONDITION, Outcome.INVALID, "WRONG_FAMILY"),
    Refused: _BY_FAILURE[Failure.OVERLOADED],
    NotReady: Verdict(grpc.StatusCode.UNAVAILABLE, Outcome.REJECTED, "STARTING", retryable=True),
    DeadlinePassed: _BY_FAILURE[Failure.DEADLINE],
    SlowReader: Verdict(grpc.StatusCode.DEADLINE_EXCEEDED, Outcome.DEADLINE, "SLOW_READER"),
}
_INTERNAL = Verdict(grpc.StatusCode.INTERNAL, Outcome.FAILED, "INTERNAL")
_RETRY_AFTER_SECONDS = 1.0
"""For retryable failures that name no time themselves."""


def verdict_on(error: Exception) -> Verdict:
    if isinstance(error, RequestFailed):
        return _BY_FAILURE[error.failed.failure]
    return _BY_TYPE.get(type(error), _INTERNAL)


def status_of(error: Exception, request_id: str) -> grpc.Status:
    """Everything the caller is told: code, message, google.rpc details, and how long to stay away."""
    verdict = verdict_on(error)
    violations = _violations(error)
    if verdict is _INTERNAL:
        message = f"internal error; the server's log has it under request id {request_id}"
    else:
        message = _cut("; ".join(f"{v.field}: {v.description}" for v in violations) or str(error), _MAX_MESSAGE)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=verdict.reason, domain=DOMAIN, metadata={"request_id": request_id})
    ]
    if violations:
        details.append(_bad_request(violations))
    metadata: list[tuple[str, str]] = [(REQUEST_ID, request_id)]
    if verdict.retryable:
        seconds = _retry_after(error)
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(seconds * 1000))
        details.append(retry)
        if verdict.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            metadata.append((PUSHBACK, str(math.ceil(seconds * 1000))))
    packed = []
    for detail in details:
        packed.append(Any())
        packed[-1].Pack(detail)
    status = rpc_status.to_status(status_pb2.Status(code=verdict.code.value[0], message=message, details=packed))
    return status._replace(trailing_metadata=(*status.trailing_metadata, *metadata))


def _retry_after(error: Exception) -> float:
    if isinstance(error, Refused):
        return error.retry_after
    known = error.failed.retry_after if isinstance(error, RequestFailed) else None
    return _RETRY_AFTER_SECONDS if known is None else known


def _violations(error: Exception) -> Sequence[Violation]:
    if isinstance(error, InvalidRequest):
        return error.violations
    if isinstance(error, ModelNotFound | WrongFamily):
        return (Violation("model", str(error)),)
    return ()


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    bad_request = error_details_pb2.BadRequest()
    for violation in violations[:_MAX_VIOLATIONS]:
        bad_request.field_violations.add(field=violation.field, description=_cut(violation.description, _MAX_DESCRIPTION))
    if (more := len(violations) - _MAX_VIOLATIONS) > 0:
        bad_request.field_violations.add(field="request", description=f"{more} more fields are invalid")
    return bad_request


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
