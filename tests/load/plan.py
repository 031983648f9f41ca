"""What the generator process is told to do, and where it may do it."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import asdict, dataclass


class PlanError(ValueError):
    """A plan that must not be carried out; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One stage of load: open loop with a ``schedule``, or closed loop with a ``concurrency`` (the capacity probe)."""

    target: str
    texts: list[str]
    """Drawn from with replacement, by ``seed``."""
    seed: int
    schedule: list[float] | None = None
    """Planned send times in seconds from the start."""
    concurrency: int | None = None
    seconds: float
    """Length of the schedule, or how long the closed loop runs."""
    stream: bool = True
    model: str = ""
    beams: int | None = None
    """None leaves the choice to the model's defaults; so for the others."""
    max_tokens: int | None = None
    deadline: float = 30.0
    """Seconds that a single call may take; it also bounds how long the stage outlives its schedule."""
    tenant: str = ""
    """In whose name the calls are made."""
    connections: int = 4
    warmup: int = 4
    """Calls made and forgotten before the clock starts."""

    def __post_init__(self) -> None:
        require_loopback(self.target)
        if (self.schedule is None) == (self.concurrency is None):
            raise PlanError("a plan is either open loop (schedule) or closed loop (concurrency)")
        if not self.texts:
            raise PlanError("a plan needs texts")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(**json.loads(text))


def require_loopback(target: str) -> None:
    """A load test floods what it is pointed at, so it may be pointed at this machine alone.

    Raises:
        PlanError: unless ``target`` is HOST:PORT with a loopback host.
    """
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise PlanError(f"target must be HOST:PORT, not {target!r}")
    if host == "localhost":
        return
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    if address is None or not address.is_loopback:
        raise PlanError(f"target must be on this machine (localhost, 127.0.0.1 or [::1]), not {host!r}")
