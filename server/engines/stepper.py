"""What ``Engine`` and ``EncodingEngine`` have in common, so that one loop drives both, wherever it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from server.batch.engine import Addressed
from server.batch.step_stats import StepStats
from server.requests import EncodingRequest, GenerationRequest

Request = GenerationRequest | EncodingRequest
Command = Request | str
"""A request to submit, or the id of one to cancel."""


class Stepper(Protocol):
    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request, /) -> None: ...
    def cancel(self, request_id: str, /) -> None: ...
    def step(self) -> tuple[list[Addressed], StepStats]: ...


def apply(commands: Iterable[Command], engine: Stepper) -> None:
    """In order: a cancellation follows the request that it cancels."""
    for command in commands:
        if isinstance(command, str):
            engine.cancel(command)
        else:
            engine.submit(command)
