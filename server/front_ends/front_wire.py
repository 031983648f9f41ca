"""What crosses between the process that owns the engines and its front ends, in the manner of ``server.engines.wire``."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from server.call import Trace
from server.config import EngineOptions, ServerOptions
from server.engines.engine_client import EngineStatus
from server.engines.wire import Message, WiredEvent, WiredRequest, WireError

# To a front end


class Begin(Message):
    """The first message: what to be."""

    number: int
    """Of this front end, from 1."""
    bundles: tuple[tuple[str, str], ...]
    """Path and fingerprint of each, in the order by which messages name models."""
    engine: EngineOptions
    server: ServerOptions
    log_level: str


class Standing(Message):
    """How the models stand; sent again and again, and answered by ``Alive`` each time."""

    statuses: tuple[EngineStatus, ...]


class Answers(Message):
    """Events of requests of this front end, by model."""

    events: dict[int, tuple[WiredEvent, ...]]


# From a front end


class Alive(Message):
    """Its event loop turns."""

    serving: bool
    """What its health says."""


class CannotBegin(Message):
    """One line saying why."""

    message: str


class Handover(Message):
    """The requests of one call, which are admitted or refused together."""

    model: int
    request_id: str
    trace: Trace
    tenant: str
    priority: int
    started: float
    """By the machine's monotonic clock, which all processes share."""
    longest_seconds: float
    requests: list[WiredRequest]


class Withdrawal(Message):
    """Nobody waits for this request any more."""

    model: int
    request_id: str


class Orders(Message):
    """In order."""

    items: tuple[Handover | Withdrawal, ...]


ToFrontEnd: TypeAlias = Begin | Standing | Answers
FromFrontEnd: TypeAlias = Alive | CannotBegin | Orders

_encoder = msgspec.msgpack.Encoder()
_to_front_end = msgspec.msgpack.Decoder(ToFrontEnd)
_from_front_end = msgspec.msgpack.Decoder(FromFrontEnd)


def encode(message: ToFrontEnd | FromFrontEnd) -> bytes:
    return _encoder.encode(message)


def decode_to_front_end(data: bytes) -> ToFrontEnd:
    """Raises WireError."""
    try:
        return _to_front_end.decode(data)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a message to a front end: {error}") from error


def decode_from_front_end(data: bytes) -> FromFrontEnd:
    """Raises WireError."""
    try:
        return _from_front_end.decode(data)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a message from a front end: {error}") from error
