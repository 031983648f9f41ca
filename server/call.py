"""One call as the server sees it, from its first byte to its one outcome."""

from __future__ import annotations

import math
import re
import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum

REQUEST_ID = "x-request-id"
"""Metadata key under which a caller may name its call, and under which the name comes back."""

TENANT = "x-tenant"
"""Metadata key under which a caller says whose share of the server it uses."""
PRIORITY = "x-priority"
"""Metadata key for how urgent a call is: low, normal or high; anything else is normal."""
PRIORITIES = {"low": -1, "normal": 0, "high": 1}

TRACEPARENT = "traceparent"
"""Metadata key of W3C trace context, which a caller's tracing brings; it comes back with this call's own span."""

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")


class Outcome(StrEnum):
    """How a call ended; every call ends in exactly one of these."""

    OK = "ok"
    INVALID = "invalid"
    NOT_FOUND = "not_found"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REJECTED = "rejected"
    FAILED = "failed"


class DeadlinePassed(Exception):
    """The caller's deadline, or the server's own longest one, passed before the answer was there."""


class SlowReader(Exception):
    """The caller did not read its stream for longer than the server is ready to hold it."""


class NotReady(Exception):
    """The server is not warm yet."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Where a call belongs in a distributed trace (W3C Trace Context, level 1)."""

    trace_id: str
    """Of the whole trace; 32 hexadecimal digits."""
    parent_id: str
    """Of the caller's span; empty when the trace begins here."""
    span_id: str
    """Of this call."""
    flags: str = "00"

    @classmethod
    def continued(cls, header: str | bytes | None) -> Trace:
        """Goes on with the caller's trace; begins one when there is none, or none that the standard allows."""
        match = _TRACEPARENT.fullmatch(header) if isinstance(header, str) else None
        if match is None or not match[1].strip("0") or not match[2].strip("0"):
            return cls(secrets.token_hex(16), "", secrets.token_hex(8))
        return cls(match[1], match[2], secrets.token_hex(8), match[3])

    @property
    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


@dataclass(slots=True)
class Call:
    """One RPC under way. The service fills in the model once it knows it."""

    method: str
    request_id: str
    model: str = ""
    """Empty until a model of this server has been found: no stranger's text becomes a metric label."""
    trace: Trace = field(default_factory=lambda: Trace.continued(None))
    tenant: str = ""
    """As the caller wrote it."""
    priority: int = 0
    """Larger goes first."""
    outcome: Outcome = Outcome.OK
    longest_seconds: float = math.inf
    """Until its deadline, counted from its beginning."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Time since the call began."""
        return time.perf_counter() - self.started

    @property
    def seconds_left(self) -> float:
        """Until its deadline; below 0 when that has passed."""
        return self.longest_seconds - self.seconds


current_call: ContextVar[Call] = ContextVar("current_call")
"""The call that the running task works for; the log formatter reads its request id."""


def accepted_request_id(offered: str | bytes | None) -> str:
    """The caller's own id when it is short and plain, otherwise a new one."""
    if isinstance(offered, str) and _ACCEPTED_ID.fullmatch(offered):
        return offered
    return secrets.token_hex(8)
