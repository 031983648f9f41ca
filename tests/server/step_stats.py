"""Accounts of steps that tests make up."""

from __future__ import annotations

from server.batch.step_stats import StepStats


def stats_of(live: int) -> StepStats:
    """A step of so many live rows, a request and a new token each, in which nobody joined and nobody waits."""
    return StepStats(
        seconds=0.0,
        runtime_seconds=0.0,
        rows=live,
        new_tokens=live,
        joined=(),
        encoded_tokens=0,
        live_requests=live,
        live_rows=live,
        row_capacity=8,
        waiting_requests=0,
        waiting_tokens=0,
        queue_seconds=(),
    )
