"""Who is in an engine, who of them has rows, and since when. Plain Python: the caller brings the time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice


class Occupancy:
    """The requests that one engine has been given and has not ended, by their ids."""

    def __init__(self) -> None:
        self.rows_wanted = 0
        """By those that have none yet."""
        self._wanting: dict[str, tuple[int, float]] = {}
        """Rows, and when it came."""
        self._since: dict[str, float] = {}
        """When it got its rows, the earliest first."""
        self._reported = 0.0

    @property
    def wanting(self) -> int:
        """Requests that have no rows yet."""
        return len(self._wanting)

    def enter(self, request_id: str, rows: int, now: float) -> None:
        self._wanting[request_id] = rows, now
        self.rows_wanted += rows

    def joined(self, request_ids: Iterable[str], now: float) -> None:
        """They got their rows in the step that has just ended, which began when the step before it did end, or they came."""
        for request_id in request_ids:
            if request_id in self._wanting:  # nobody has left meanwhile
                self._since[request_id] = max(self._no_longer_wants(request_id), self._reported)
        self._reported = now

    def leave(self, request_id: str, now: float) -> float | None:
        """Seconds for which it had its rows; None if it never had."""
        if request_id in self._wanting:
            self._no_longer_wants(request_id)
            return None
        return now - self._since.pop(request_id)

    def until_ended(self, count: int, seconds_each: float, now: float) -> float:
        """Seconds until so many will have ended, of those that have rows and of those that follow them, if each takes as long
        as is said; 0 when none has rows. After a burst they all end together, and until then no row is free."""
        if not self._since:
            return 0.0
        rounds, place = divmod(count - 1, len(self._since))
        first = next(islice(self._since.values(), place, None))
        return max(0.0, first + (1 + rounds) * seconds_each - now)

    def _no_longer_wants(self, request_id: str) -> float:
        """When it came."""
        rows, came = self._wanting.pop(request_id)
        self.rows_wanted -= rows
        return came
