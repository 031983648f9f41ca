"""What admission promises, as plainly as it can be said, to compare with what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.call import Call
from server.requests import GenerationRequest
from server.waiting.admission import AdmissionLimits, Forecast, Refused
from server.waiting.waiting_room import WaitingRoom

_SHORTEST_RETRY, _LONGEST_RETRY = 0.05, 30.0
_CAUTION = 2.0
"""A forecast may be off by so much: who would be late then may be refused."""


@dataclass(frozen=True, slots=True)
class _Reason:
    """Why a call must be refused, or may be; and when it may come again, at the earliest and at the latest."""

    what: str
    earliest: float
    latest: float
    compels: bool = True


@dataclass(slots=True)
class Rules:
    """Watches every admission of one life. Raises AssertionError for one that was wrong."""

    room: WaitingRoom
    limits: AdmissionLimits
    _requests: int = 0
    """Let in, and not handed over yet."""
    _tokens: int = 0
    _of_tenant: Counter[str] = field(default_factory=Counter)
    _tokens_of_tenant: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def admit(self, call: Call, requests: Sequence[GenerationRequest]) -> Iterator[None]:
        tokens = sum(len(request.input_ids) for request in requests)
        tenant = call.tenant if call.tenant in self.limits.tenants else ""
        reasons = self._reasons(call, tenant, len(requests), tokens)
        entered = False
        try:
            with self.room.admit(requests):
                entered = True
                assert not any(reason.compels for reason in reasons), f"let in, though {reasons}"
                self._requests += len(requests)
                self._tokens += tokens
                self._of_tenant[tenant] += len(requests)
                self._tokens_of_tenant[tenant] += tokens
                try:
                    yield
                finally:
                    self._requests -= len(requests)
                    self._tokens -= tokens
                    self._of_tenant[tenant] -= len(requests)
                    self._tokens_of_tenant[tenant] -= tokens
        except Refused as refused:
            assert not entered
            assert refused.args == (str(refused),)
            assert reasons, f"refused for no reason: {refused}"
            first = reasons[0]
            assert first.earliest <= refused.retry_after * 1.001, f"{first}, but come again after {refused.retry_after:.3g} s"
            assert refused.retry_after <= first.latest * 1.001, (
                f"{first}, but come again only after {refused.retry_after:.3g} s"
            )
            raise

    def _reasons(self, call: Call, tenant: str, requests: int, tokens: int) -> list[_Reason]:
        """In the order in which they are told."""
        assert self.room._admission.on_the_way == self._requests
        assert self.room._admission.on_the_way_of(tenant) == self._of_tenant[tenant]
        status, forecast, reasons = self.room.status, self.room.forecast(requests), list[_Reason]()
        waiting, waiting_tokens = status.waiting_requests + self._requests, status.waiting_tokens + self._tokens
        over = waiting + requests - self.limits.max_waiting_requests
        over_tokens = waiting_tokens + tokens - self.limits.max_waiting_tokens
        if waiting and (over > 0 or over_tokens > 0):
            seconds = self._until_served(max(over, over_tokens * waiting / max(1, waiting_tokens)), forecast)
            reasons.append(_Reason("too much waits", seconds, seconds))
        own = self.room._queue.waiting_of(tenant) + self._of_tenant[tenant]
        own_tokens = self.room._use[tenant].waiting_tokens + self._tokens_of_tenant[tenant]
        most, most_tokens = self.limits.max_waiting_of(tenant)
        over, over_tokens = own + requests - most, own_tokens + tokens - most_tokens
        if own and (over > 0 or over_tokens > 0):
            seconds = self._until_served(max(over, over_tokens * own / max(1, own_tokens)), forecast)
            reasons.append(_Reason("too much of the tenant's waits", seconds, seconds))
        if forecast.wait:
            late, perhaps_late = (
                times * forecast.wait + forecast.seconds_each - call.seconds_left for times in (1.0, _CAUTION)
            )
            if perhaps_late > 0:
                reasons.append(_Reason("it would be late", _bounded(late), _bounded(perhaps_late), compels=late > 0))
        return reasons

    def _until_served(self, requests: float, forecast: Forecast) -> float:
        return _bounded(requests / forecast.per_second) if forecast.per_second else self.limits.retry_after_seconds


def _bounded(seconds: float) -> float:
    return min(_LONGEST_RETRY, max(_SHORTEST_RETRY, seconds))
