"""What the engine reports of itself, once a step. The core reports, the edge measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step of the engine; all times in seconds."""

    seconds: float
    """The whole step."""
    runtime_seconds: float
    """The part of it inside ONNX Runtime."""
    rows: int
    """Rows of the decode step; 0 when nothing was decoded."""
    new_tokens: int
    joined: tuple[str, ...]
    """Ids of the requests that got their rows in this step, their input encoded or prefilled, in order."""
    encoded_tokens: int
    live_requests: int
    live_rows: int
    row_capacity: int
    waiting_requests: int
    waiting_tokens: int
    queue_seconds: tuple[float, ...]
    """Time each of ``joined`` had waited."""
    wasted_tokens: int = 0
    """Output tokens computed for requests that were cancelled since the step before."""
