"""Which engine to build: plain values that can cross to another process, where the engine is built from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One engine of one model."""

    bundle: str
    """Path of the bundle."""
    fingerprint: str
    """Of the bundle: what was promised to callers is what must run, even if the files have changed since."""
    precision: str
    rows: int
    """Most rows of the running batch."""
    device: str
    threads: int
