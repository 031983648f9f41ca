"""One exception for whatever ends a call, with everything the server said."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

_CALLERS_FAULT = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of the request that must change."""

    field: str
    description: str


class CallError(Exception):
    """A call that ended without an answer.

    Attributes:
        violations: the fields at fault, for INVALID_ARGUMENT and its kin.
        reason: tells apart what shares a code, for example "OVERLOADED"; empty when no server of ours answered.
        retry_after: seconds after which the same call may succeed; None when the server named none.
        request_id: by which the server's log knows the call.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        violations: tuple[FieldViolation, ...] = (),
        reason: str = "",
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.violations = violations
        self.reason = reason
        self.retry_after = retry_after
        self.request_id = request_id

    @property
    def callers_fault(self) -> bool:
        """The same call can never succeed."""
        return self.code in _CALLERS_FAULT

    @classmethod
    def from_rpc(cls, error: grpc.RpcError) -> CallError:
        """Reads the code, the message and the google.rpc details of a failed call."""
        violations: list[FieldViolation] = []
        reason, retry_after = "", None
        try:
            status = rpc_status.from_call(error)
        except ValueError:  # details that contradict the status: not written by our server
            status = None
        for packed in status.details if status is not None else ():
            if packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad_request = error_details_pb2.BadRequest.FromString(packed.value)
                violations += [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
            elif packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                reason = error_details_pb2.ErrorInfo.FromString(packed.value).reason
            elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry_after = error_details_pb2.RetryInfo.FromString(packed.value).retry_delay.ToMilliseconds() / 1000
        metadata = dict(error.trailing_metadata() or ())
        return cls(
            error.code(),
            error.details() or "",
            violations=tuple(violations),
            reason=reason,
            retry_after=retry_after,
            request_id=str(metadata.get("x-request-id", "")),
        )
