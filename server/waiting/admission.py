"""Says yes to a call, or no with a time to come back. Plain Python: no clock, no gRPC."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """What one tenant may have."""

    weight: float = 1.0
    """Its share of the rows, beside those of the other tenants that have requests waiting."""
    max_waiting: int | None = None
    """Requests that may wait at once; None: its share of the queue, by weight."""
    max_rows: int | None = None
    """Rows of one model that its requests may hold at once, as they would hold all of them while nobody else has any. On a CPU
    a step takes time in proportion to its rows, so this bounds how much a tenant slows down the others. A wider request goes
    alone. None: all rows."""


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

    def max_waiting_of(self, name: str) -> tuple[int, int]:
        """Requests and tokens that one tenant may have waiting: however much it asks for, the others find room."""
        _, tenant = self.tenant(name)
        share = tenant.weight / (self.others.weight + sum(tenant.weight for tenant in self.tenants.values()))
        requests = math.ceil(share * self.max_waiting_requests) if tenant.max_waiting is None else tenant.max_waiting
        return requests, math.ceil(share * self.max_waiting_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a call asks for."""

    tenant: str = ""
    """The name it is counted under."""
    requests: int
    tokens: int
    seconds_left: float
    """To the call's deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What waits when a call comes."""

    requests: int = 0
    tokens: int = 0
    own_requests: int = 0
    """Of the call's tenant."""
    own_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a call can expect."""

    wait: float
    """Seconds until the last of its requests has rows, behind those that are on the way; 0 where it has them at once, or
    nothing is known."""
    seconds_each: float
    """Seconds for which a request has its rows, which few requests exceed; 0 while not known."""
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
        self._requests: Counter[str] = Counter()
        """On the way, by tenant."""
        self._tokens: Counter[str] = Counter()

    @property
    def on_the_way(self) -> int:
        """Requests that have been admitted and not handed over."""
        return self._requests.total()

    def on_the_way_of(self, tenant: str) -> int:
        """Those of one tenant among them."""
        return self._requests[tenant]

    @contextmanager
    def admit(self, demand: Demand, waiting: Waiting, forecast: Forecast) -> Iterator[None]:
        """Holds a place for a call's requests until they are handed over, which is the end of the block.

        A call larger than the whole queue is admitted when nothing waits, and one larger than its tenant's share when nothing
        of that tenant does: its size was checked at the door.

        Raises:
            Refused: when the queue has no room for all of them, or they would come too late.
        """
        self.check(demand, waiting, forecast)
        tenant = demand.tenant
        self._requests[tenant] += demand.requests
        self._tokens[tenant] += demand.tokens
        try:
            yield
        finally:
            self._requests[tenant] -= demand.requests
            self._tokens[tenant] -= demand.tokens
            if not self._requests[tenant]:
                del self._requests[tenant], self._tokens[tenant]

    def check(self, demand: Demand, waiting: Waiting, forecast: Forecast) -> None:
        """As ``admit``, and holds no place. Raises Refused."""
        most = self._limits.max_waiting_requests, self._limits.max_waiting_tokens
        requests, tokens = waiting.requests + self.on_the_way, waiting.tokens + self._tokens.total()
        if over := _beyond(most, requests, tokens, demand):
            raise Refused(
                f"the server is busy: {requests} requests of {tokens} tokens are waiting", self._until_served(over, forecast)
            )
        most = self._limits.max_waiting_of(demand.tenant)
        own = waiting.own_requests + self.on_the_way_of(demand.tenant)
        own_tokens = waiting.own_tokens + self._tokens[demand.tenant]
        if over := _beyond(most, own, own_tokens, demand):
            raise Refused(
                f"this tenant has {own} requests of {own_tokens} tokens waiting, and may have {most[0]} of {most[1]}",
                self._until_served(over, forecast),
            )
        self._check_deadline(demand, forecast)

    def _check_deadline(self, demand: Demand, forecast: Forecast) -> None:
        late = _CAUTION * forecast.wait + forecast.seconds_each - demand.seconds_left
        if forecast.wait and late > 0:
            expected, left = forecast.wait + forecast.seconds_each, demand.seconds_left
            raise Refused(
                f"the answer would take about {expected:.3g} s, and there are {left:.3g} s left",
                min(_LONGEST_RETRY, max(_SHORTEST_RETRY, late)),
            )

    def _until_served(self, requests: float, forecast: Forecast) -> float:
        if forecast.per_second is None:
            return self._limits.retry_after_seconds
        return min(_LONGEST_RETRY, max(_SHORTEST_RETRY, requests / forecast.per_second))


def _beyond(most: tuple[int, int], requests: int, tokens: int, demand: Demand) -> float:
    """How many requests are too many; 0 when there is room."""
    if not requests:
        return 0.0
    over_tokens = tokens + demand.tokens - most[1]
    # Tokens in the terms of requests: what waits is a fair sample of what will be served.
    return max(0.0, requests + demand.requests - most[0], over_tokens * requests / max(1, tokens))
