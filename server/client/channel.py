"""How a channel to the service is set up. Clients in other languages can use ``SERVICE_CONFIG`` as it stands.

Calls go round all healthy replicas, and those that a replica could not take (UNAVAILABLE: it is going, gone or not there yet)
are tried again elsewhere; when many fail, retries stop by themselves. RESOURCE_EXHAUSTED is not retried: a request that is too
large gets it as well as one too many, and trying again into an overload feeds it. The caller finds the time to come back in
``CallError.retry_after``.
"""

from __future__ import annotations

import json
from typing import Any

SERVICE = "transformer.v1.Transformer"

SERVICE_CONFIG: dict[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
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
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
