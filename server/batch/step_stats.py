"""What the engine reports of itself, once a step. The core reports, the edge measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class StepStats:
    """One step of the engine, which fills it in as it goes; all times in seconds."""

    seconds: float = 0.0
    """The whole step."""
    runtime_seconds: float = 0.0
    """The part of it inside ONNX Runtime."""
    rows: int = 0
    """Rows of the decode step; 0 when nothing was decoded."""
    new_tokens: int = 0
    joined: tuple[str, ...] = ()
    """Ids of the requests that got their rows in this step, their input encoded or prefilled, in order."""
    encoded_tokens: int = 0
    live_requests: int = 0
    live_rows: int = 0
    row_capacity: int = 0
    waiting_requests: int = 0
    waiting_tokens: int = 0
    queue_seconds: tuple[float, ...] = ()
    """Time each of ``joined`` had waited."""
    wasted_tokens: int = 0
    """Output tokens computed for requests that were cancelled since the step before."""
