"""How fast requests are served, as measured. Plain Python: the caller brings the time.

The rate counts only while requests were waiting: at other times it says how fast they came, not how fast they could go. The
time that one takes counts only in a crowd, once it is known of one: among few others a request is faster, and nobody asks then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_MEMORY_SECONDS, _MEMORY_ENDS = 5.0, 16
"""The average is over about so long and so many, whichever is more."""
_LEAST_ENDS = 8
"""Fewer are no measurement."""
_DEVIATIONS = 2.0
_SHARE_OF_NEW = 0.1
"""How much the latest request counts in the time that one takes."""


@dataclass(slots=True)
class ServiceRate:
    """Decaying averages over the requests that ended."""

    seconds_each: float | None = None
    """For which a request has its rows, on average, in a crowd; None before the first."""
    deviation: float = 0.0
    """Of single requests from that average, on average."""
    _ends: float = 0.0
    _seconds: float = 0.0
    _crowded: bool = False
    """Some request has ended in a crowd."""
    _latest: float | None = None
    """The end that the next interval is counted from; None after a time when nothing waited."""

    def ended(self, now: float, seconds: float | None, *, others_wait: bool, crowd: bool) -> None:
        """Args: seconds: for which it had its rows; None where it left without a result; crowd: others had most of the rows."""
        self._crowded |= crowd
        if seconds is not None and crowd is self._crowded:
            if self.seconds_each is None:
                self.seconds_each = seconds
            self.deviation += _SHARE_OF_NEW * (abs(seconds - self.seconds_each) - self.deviation)
            self.seconds_each += _SHARE_OF_NEW * (seconds - self.seconds_each)
        if self._latest is not None:
            elapsed = now - self._latest
            kept = max(math.exp(-elapsed / _MEMORY_SECONDS), 1 - 1 / _MEMORY_ENDS)
            self._ends = self._ends * kept + 1
            self._seconds = self._seconds * kept + elapsed
        self._latest = now if others_wait else None

    @property
    def per_second(self) -> float | None:
        """Requests served each second while others wait; None before that was measured."""
        return self._ends / self._seconds if self._ends >= _LEAST_ENDS and self._seconds > 0 else None

    @property
    def most_seconds_each(self) -> float:
        """That few requests exceed; 0 before the first. As TCP does it (RFC 6298), with less of the deviation."""
        return (self.seconds_each or 0.0) + _DEVIATIONS * self.deviation

    def wait(self, ahead: int) -> float:
        """Seconds until ``ahead`` requests have had their turn; 0 while nothing is known."""
        rate = self.per_second
        return ahead / rate if rate else 0.0
