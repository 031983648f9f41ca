"""What crosses between a front end and its engine process: msgpack in a fixed schema, checked when it arrives. No pickle.

The schema is that of ``server.requests``, ``StepStats`` and ``EngineSpec``: a field added there crosses without a change here.
msgspec tells the members of a union apart by the tag of a Struct, so each dataclass that is one of several travels in a
Struct of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias, assert_never

import msgspec
from msgspec import Struct

from server.batch.engine import Addressed
from server.batch.step_stats import StepStats
from server.engines.engine_spec import EngineSpec
from server.engines.stepper import Command, Request
from server.requests import Encoded, EncodingRequest, Failed, Finished, GenerationRequest, TokensReady


class WireError(Exception):
    """What arrived is no message of the schema."""


class Message(Struct, array_like=True, forbid_unknown_fields=True, tag=True):
    pass


# To the engine


class Start(Message):
    """The first message: what to be."""

    spec: EngineSpec
    log_level: str


class _Generate(Message):
    request: GenerationRequest


class _Encode(Message):
    request: EncodingRequest


WiredRequest: TypeAlias = _Generate | _Encode


class _Cancel(Message):
    request_id: str


class Commands(Message):
    """In order. Each of these messages is answered by at least one Report."""

    items: tuple[WiredRequest | _Cancel, ...]

    @classmethod
    def of(cls, commands: Sequence[Command]) -> Commands:
        return cls(tuple(map(_wrap_command, commands)))

    def unwrap(self) -> list[Command]:
        return [item.request_id if isinstance(item, _Cancel) else item.request for item in self.items]


# From the engine


class Ready(Message):
    """Loaded and warm."""


class Unavailable(Message):
    """It cannot be: one line saying why."""

    message: str


class _Tokens(Message):
    request_id: str
    event: TokensReady


class _Finished(Message):
    request_id: str
    event: Finished


class _Encoded(Message):
    request_id: str
    event: Encoded


class _Failed(Message):
    request_id: str
    event: Failed


WiredEvent: TypeAlias = _Tokens | _Finished | _Encoded | _Failed


class Report(Message):
    """What the steps since the last report have brought, or only that commands have been taken."""

    taken: int
    """Commands messages taken since the start."""
    events: tuple[WiredEvent, ...]
    """Of all these steps, in order."""
    steps: tuple[StepStats, ...]
    """Empty when there was nothing to do."""

    @classmethod
    def of(cls, taken: int, events: Iterable[Addressed], steps: Iterable[StepStats]) -> Report:
        return cls(taken, wrap_events(events), tuple(steps))

    def unwrap(self) -> list[Addressed]:
        return unwrap_events(self.events)


ToEngine: TypeAlias = Start | Commands
FromEngine: TypeAlias = Ready | Unavailable | Report

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Raises WireError."""
    try:
        return _to_engine.decode(data)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a message to an engine: {error}") from error


def decode_from_engine(data: bytes) -> FromEngine:
    """Raises WireError."""
    try:
        return _from_engine.decode(data)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a message from an engine: {error}") from error


def _wrap_command(command: Command) -> WiredRequest | _Cancel:
    return _Cancel(command) if isinstance(command, str) else wrap_request(command)


def wrap_request(request: Request) -> WiredRequest:
    return _Generate(request) if isinstance(request, GenerationRequest) else _Encode(request)


def wrap_events(events: Iterable[Addressed]) -> tuple[WiredEvent, ...]:
    return tuple(map(_wrap_event, events))


def unwrap_events(events: Iterable[WiredEvent]) -> list[Addressed]:
    return [(item.request_id, item.event) for item in events]


def _wrap_event(addressed: Addressed) -> WiredEvent:
    request_id, event = addressed
    if isinstance(event, TokensReady):
        return _Tokens(request_id, event)
    if isinstance(event, Finished):
        return _Finished(request_id, event)
    if isinstance(event, Encoded):
        return _Encoded(request_id, event)
    if isinstance(event, Failed):
        return _Failed(request_id, event)
    assert_never(event)
