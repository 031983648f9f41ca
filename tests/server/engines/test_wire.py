"""What crosses between processes arrives as it was sent, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batch.step_stats import StepStats
from server.engines import wire
from server.engines.engine_spec import EngineSpec
from server.requests import Encoded, EncodingRequest, Failed, Finished, GenerationRequest, TokensReady


def values_of(kind: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Any value of a type, as its annotations give it: fields that come later are tried too."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(kind)})
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        members = typing.get_args(kind)
        if members[-1] is ...:
            return st.lists(values_of(members[0]), max_size=3).map(tuple)
        return st.tuples(*map(values_of, members))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from(kind)
    if kind is int:
        return st.integers(0, 2**64 - 1)
    if kind is float:
        return st.floats(allow_nan=False)
    return st.from_type(kind)


commands = st.lists(values_of(GenerationRequest) | values_of(EncodingRequest) | st.text(max_size=9), max_size=4)
event = st.one_of(*map(values_of, (TokensReady, Finished, Encoded, Failed)))
events = st.lists(st.tuples(st.text(max_size=9), event), max_size=4)


@given(commands)
def test_commands_arrive_as_they_were_sent(sent: list[typing.Any]) -> None:
    message = wire.decode_to_engine(wire.encode(wire.Commands.of(sent)))
    assert isinstance(message, wire.Commands)
    assert message.unwrap() == sent


@given(st.integers(0, 2**40), events, values_of(tuple[StepStats, ...]))
def test_reports_arrive_as_they_were_sent(taken: int, sent: list[typing.Any], steps: tuple[StepStats, ...]) -> None:
    message = wire.decode_from_engine(wire.encode(wire.Report.of(taken, sent, steps)))
    assert isinstance(message, wire.Report)
    assert (message.taken, message.unwrap(), message.steps) == (taken, sent, steps)


@given(values_of(EngineSpec))
def test_a_specification_arrives_as_it_was_sent(spec: EngineSpec) -> None:
    start = wire.Start(spec, "info")
    assert wire.decode_to_engine(wire.encode(start)) == start


@given(st.binary(max_size=60))
def test_other_bytes_are_refused(data: bytes) -> None:
    for decode in (wire.decode_to_engine, wire.decode_from_engine):
        with pytest.raises(wire.WireError):
            decode(data)


@pytest.mark.parametrize(
    "message",
    [
        ["Commands", [["_Generate", {"id": 5}]]],
        ["Commands", [["_Cancel", "r", "more"]]],
        ["Commands", [["os.system", "true"]]],
        ["Start", {"bundle": "b"}, "info"],
        ["Report", 0, [], None],
    ],
)
def test_messages_that_break_the_schema_are_refused(message: object) -> None:
    with pytest.raises(wire.WireError, match="^not a message to an engine: "):
        wire.decode_to_engine(msgspec.msgpack.encode(message))
