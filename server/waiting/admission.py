"""Says yes to a call, or no with a time to come back. Plain Python: no clock, no gRPC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.engines.engine_client import EngineStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """What one tenant may have."""

    weight: float = 1.0
    """Its share of the rows, beside those of the other tenants that have requests waiting."""
    max_waiting: int | None = None
    """Requests that may wait at once; None: as many as the whole queue takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """How much may wait for one model."""

    max_waiting_requests: int = 1024
    """A call of n inputs counts n times."""
    max_waiting_tokens: int = 131_072
    """Input tokens, so that a few long requests weigh as much as many short ones."""
    retry_after_seconds: float = 1.0
    """What a refused caller is told before the rate of service is known."""
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    """By name; a caller who names none of these shares ``others`` with all who do so."""
    others: Tenant = field(default_factory=Tenant)

    def tenant(self, name: str) -> tuple[str, Tenant]:
        """The name it is counted under, so that strangers cannot multiply their share by inventing names."""
        return (name, self.tenants[name]) if name in self.tenants else ("", self.others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a call can expect."""

    wait: float
    """Seconds until its requests have their turn, as far as is known."""
    seconds_each: float
    """Seconds from a request's turn to its end, which few requests exceed; 0 while not known."""
    per_second: float | None
    """Requests served each second; None while not known."""


class Refused(Exception):
    """There is no room, or the answer would be late; the same call may succeed after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


_SHORTEST_RETRY, _LONGEST_RETRY = 0.05, 30.0
_CAUTION = 1.5
"""The wait may turn out so much longer than forecast. A queue that is shorter than it could be keeps the rows as busy; one that
is longer than it was thought to be makes everybody in it late."""


class Admission:
    """Guards the queue of one model.

    What is reported as waiting is only part of the truth: calls that have been admitted and have not yet handed their
    requests over count too, or a burst would pass before the first of it is seen.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._requests_on_the_way = 0
        self._tokens_on_the_way = 0
        self._on_the_way_of: Counter[str] = Counter()

    @contextmanager
    def admit(
        self,
        status: EngineStatus,
        forecast: Forecast,
        *,
        requests: int,
        tokens: int,
        seconds_left: float,
        tenant: str = "",
        waiting_of_tenant: int = 0,
    ) -> Iterator[None]:
        """Holds a place for a call's requests until they are handed over, which is the end of the block.

        A call larger than the whole queue is admitted when nothing waits: its size was checked at the door.

        Args:
            seconds_left: to the call's deadline.
            tenant: the name it is counted under.

        Raises:
            Refused: when the queue has no room for all of them, or they would come too late.
        """
        self.check(
            status,
            forecast,
            requests=requests,
            tokens=tokens,
            seconds_left=seconds_left,
            tenant=tenant,
            waiting_of_tenant=waiting_of_tenant,
        )
        self._requests_on_the_way += requests
        self._tokens_on_the_way += tokens
        self._on_the_way_of[tenant] += requests
        try:
            yield
        finally:
            self._requests_on_the_way -= requests
            self._tokens_on_the_way -= tokens
            self._on_the_way_of[tenant] -= requests
            if not self._on_the_way_of[tenant]:
                del self._on_the_way_of[tenant]

    def check(
        self,
        status: EngineStatus,
        forecast: Forecast,
        *,
        requests: int,
        tokens: int,
        seconds_left: float,
        tenant: str = "",
        waiting_of_tenant: int = 0,
    ) -> None:
        """As ``admit``, and holds no place. Raises Refused."""
        self._check_room(status, forecast, requests, tokens)
        self._check_cap(forecast, requests, tenant, waiting_of_tenant)
        self._check_deadline(forecast, requests, seconds_left)

    def _check_room(self, status: EngineStatus, forecast: Forecast, requests: int, tokens: int) -> None:
        waiting_requests = status.waiting_requests + self._requests_on_the_way
        waiting_tokens = status.waiting_tokens + self._tokens_on_the_way
        over_requests = waiting_requests + requests - self._limits.max_waiting_requests
        over_tokens = waiting_tokens + tokens - self._limits.max_waiting_tokens
        if waiting_requests and (over_requests > 0 or over_tokens > 0):
            # Tokens in the terms of requests: what waits is a fair sample of what will be served.
            over = max(over_requests, over_tokens * waiting_requests / max(1, waiting_tokens))
            raise Refused(
                f"the server is busy: {waiting_requests} requests of {waiting_tokens} tokens are waiting",
                self._until_served(over, forecast),
            )

    def _check_cap(self, forecast: Forecast, requests: int, tenant: str, waiting: int) -> None:
        cap = self._limits.tenant(tenant)[1].max_waiting
        waiting += self._on_the_way_of[tenant]
        if cap is not None and waiting and waiting + requests > cap:
            raise Refused(
                f"this tenant has {waiting} requests waiting, and may have {cap}",
                self._until_served(waiting + requests - cap, forecast),
            )

    def _check_deadline(self, forecast: Forecast, requests: int, seconds_left: float) -> None:
        wait = forecast.wait
        if forecast.per_second and wait:
            wait += (self._requests_on_the_way + requests - 1) / forecast.per_second
        if wait and _CAUTION * wait + forecast.seconds_each > seconds_left:
            late = _CAUTION * wait + forecast.seconds_each - seconds_left
            raise Refused(
                f"the answer would take about {wait + forecast.seconds_each:.3g} s, and there are {seconds_left:.3g} s left",
                min(_LONGEST_RETRY, max(_SHORTEST_RETRY, late)),
            )

    def _until_served(self, requests: float, forecast: Forecast) -> float:
        if forecast.per_second is None:
            return self._limits.retry_after_seconds
        return min(_LONGEST_RETRY, max(_SHORTEST_RETRY, requests / forecast.per_second))
