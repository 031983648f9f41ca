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


@dataclass(slots=True)
class Call:
    """One RPC under way. The service fills in the model once it knows it."""

    method: str
    request_id: str
    model: str = ""
    """Empty until a model of this server has been found: no stranger's text becomes a metric label."""
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
