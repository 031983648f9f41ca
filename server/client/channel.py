"""How a channel to the service is set up. Clients in other languages can use ``SERVICE_CONFIG`` as it stands.

Calls go round all healthy replicas, and those that a replica could not take (UNAVAILABLE: it is going, gone or not there yet;
CANCELLED: gRPC's core ended the call before any handler saw it, as that of a server does which stops, or is flooded) are tried
again elsewhere; when many fail, retries stop by themselves. A call that its own caller cancels is not. RESOURCE_EXHAUSTED is
not retried: a request that is too large gets it as well as one too many, and trying again into an overload feeds it. The caller
finds the time to come back in ``CallError.retry_after``.
"""

from __future__ import annotations

import json
import math
from typing import Any

import grpc

SERVICE = "transformer.v1.Transformer"
PRIORITIES = ("low", "normal", "high")

GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""From a replica that has not served the call: another may."""

SERVICE_CONFIG: dict[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": [code.name for code in GONE],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}

HEALTH_CHECK_CONFIG = {"serviceName": SERVICE}
"""Added to the service config, it keeps calls away from replicas that say NOT_SERVING."""

_MAX_RESPONSE_BYTES = 64 * 1024 * 1024


def channel_options(*, watch_health: bool) -> list[tuple[str, Any]]:
    """Channel arguments of gRPC's core; the keepalive suits what our servers permit."""
    config = {**SERVICE_CONFIG, "healthCheckConfig": HEALTH_CHECK_CONFIG} if watch_health else SERVICE_CONFIG
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
        # A replica that is back is found within a second. gRPC's own pauses grow to two minutes: by then the next one is gone.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def checked_timeout(seconds: float) -> float:
    """Raises ValueError for a timeout that would be none: no call may wait for ever."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"timeout must be above 0 and finite, not {seconds:g}")
    return seconds


def checked_priority(priority: str) -> str:
    """Raises ValueError for a priority that the service does not know."""
    if priority not in PRIORITIES:
        raise ValueError(f"priority must be one of {', '.join(PRIORITIES)}, not {priority!r}")
    return priority


def call_metadata(priority: str, tenant: str, request_id: str) -> tuple[tuple[str, str], ...]:
    """What a call says about itself beside its message; what is usual is left out."""
    said = {"x-request-id": request_id, "x-tenant": tenant, "x-priority": "" if priority == "normal" else priority}
    return tuple((key, value) for key, value in said.items() if value)
