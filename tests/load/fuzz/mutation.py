"""Requests gone wrong: valid ones, changed in their fields by what the proto says of them, in their bytes by what wires do.

Everything is drawn from the generator that is passed in, so that the number of a request is enough to make it again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from protos import transformer_pb2 as pb

METHODS: tuple[MethodDescriptor, ...] = tuple(pb.DESCRIPTOR.services_by_name["Transformer"].methods)

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_TEXTS = [
    "",
    " ",
    "\t\n",
    "\0",
    "a\0b",
    "é" * 30,
    "a" + "\u0301" * 60,
    "\u202e" + "abc",
    "😀" * 5,
    "👩‍👩‍👧‍👦",
    "\ufeffa",
    "\uffff",
    "\U0010ffff",
    "%s%n{}${jndi:x}",
    "../../etc/passwd",
    "encoder_decoder",
    "a" * 200,
    "a" * 5_000,
]
_UNSIGNED = [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 255, 256, 1024, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
_REALS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-6, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 2.0, 10.0, 100.0]
_REPETITIONS = [1, 1, 2, 3, 17, 65, 300]
_MOST_CHANGES = 4


@dataclass(frozen=True, slots=True)
class Mutated:
    """One request to send."""

    method: MethodDescriptor
    data: bytes


def mutated(rng: random.Random) -> Mutated:
    """A request of any method: about half of those that still decode are valid in all but one or two fields."""
    method = rng.choice(METHODS)
    message = valid_request(rng, method)
    kind = rng.random()
    if kind < 0.7:
        for _ in range(rng.randint(1, _MOST_CHANGES)):
            mutate_field(rng, message)
    data = message.SerializeToString()
    if kind > 0.55:
        for _ in range(rng.randint(1, _MOST_CHANGES)):
            data = mutate_bytes(rng, data)
    return Mutated(method, data)


def valid_request(rng: random.Random, method: MethodDescriptor) -> Message:
    """One that a server of the three tiny models answers."""
    make = _VALID[method.name.removesuffix("Stream")]
    return make(rng)


def _text(rng: random.Random) -> str:
    return "".join(rng.choices(_LETTERS, k=rng.randint(1, 12)))


def _input(rng: random.Random) -> pb.Input:
    if rng.random() < 0.8:
        return pb.Input(text=_text(rng))
    return pb.Input(tokens=pb.TokenIds(ids=[rng.randrange(4, 40) for _ in range(rng.randint(1, 9))]))


def _generate(rng: random.Random) -> pb.GenerateRequest:
    options = pb.GenerationOptions(max_tokens=rng.randint(1, 8), beams=rng.choice([1, 1, 2]))
    extra = rng.randrange(8)
    if extra == 0:
        options = pb.GenerationOptions(max_tokens=6, hypotheses=2, sampling=pb.Sampling(seed=rng.randrange(99), top_k=5))
    elif extra == 1:
        options.stop_strings.append(_text(rng)[:2])
    elif extra == 2:
        options.token_bias.add(id=rng.randrange(4, 40), bias=2.0)
        options.repetition_penalty = 1.5
    elif extra == 3:
        options.alternatives, options.no_repeat_ngram = 2, 2
    elif extra == 4:
        options.beams, options.max_tokens = 2, 8
        options.required_phrases.add(text="ab")
    return pb.GenerateRequest(
        model=rng.choice(["encoder_decoder", "encoder_decoder", "decoder_only"]),
        inputs=[_input(rng)],
        options=options,
        return_tokens=rng.random() < 0.5,
    )


_VALID: dict[str, Callable[[random.Random], Message]] = {
    "Generate": _generate,
    "Classify": lambda rng: pb.ClassifyRequest(model="encoder_only", inputs=[_input(rng)]),
    "Embed": lambda rng: pb.EmbedRequest(model="encoder_only", inputs=[_input(rng)], normalize=True),
    "Score": lambda rng: pb.ScoreRequest(
        model="encoder_decoder", pairs=[pb.ScorePair(source=_input(rng), target=_input(rng))], return_tokens=True
    ),
    "Tokenize": lambda rng: pb.TokenizeRequest(model="encoder_decoder", texts=[_text(rng)]),
    "ListModels": lambda rng: pb.ListModelsRequest(),
}


# Fields


def mutate_field(rng: random.Random, message: Message) -> None:
    """Changes one field, somewhere in the message."""
    nodes = [node for node in _nodes(message) if node.DESCRIPTOR.fields]
    if not nodes:
        return
    node = rng.choice(nodes)
    field = rng.choice(node.DESCRIPTOR.fields)
    if field.name == "model" and rng.random() < 0.9:  # one answer, NOT_FOUND, is enough of it
        field = rng.choice(node.DESCRIPTOR.fields)
    if rng.random() < 0.1:
        node.ClearField(field.name)
    elif field.is_repeated:
        _mutate_repeated(rng, getattr(node, field.name), field)
    elif field.message_type is not None:
        getattr(node, field.name).SetInParent()
        if rng.random() < 0.5:
            mutate_field(rng, getattr(node, field.name))
    else:
        setattr(node, field.name, _value(rng, field))


def _nodes(message: Message) -> list[Message]:
    """The message and all that lie in it."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else (value,):
                found += _nodes(inner)
    return found


def _mutate_repeated(rng: random.Random, values: Any, field: FieldDescriptor) -> None:
    times = rng.choice(_REPETITIONS)
    if len(values) and rng.random() < 0.3:
        del values[rng.randrange(len(values)) :]
    elif field.message_type is None:
        values.extend([_value(rng, field)] * times)
    elif len(values) and rng.random() < 0.7:
        values.extend([values[0]] * times)
    else:
        for _ in range(times):
            mutate_field(rng, values.add())


def _value(rng: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(_TEXTS) if rng.random() < 0.6 else _text(rng)
        case FieldDescriptor.CPPTYPE_UINT32:
            return rng.choice(_UNSIGNED)
        case FieldDescriptor.CPPTYPE_UINT64:
            return rng.choice([*_UNSIGNED, 2**63, 2**64 - 1])
        case FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice(_REALS) if rng.random() < 0.7 else rng.gauss(0, 10)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice([*field.enum_type.values_by_number, 99])  # which is the number of nothing
        case other:
            raise TypeError(f"{field.full_name}: say here how values of type {other} are mutated")


# Bytes


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Changes the encoding: what a broken client, a broken wire or a stranger may send."""
    at, change = rng.randrange(len(data) + 1), rng.randrange(10)
    length = min(len(data) - at, rng.choice([1, 1, 2, 4, 16]))
    match change:
        case 0 | 1 if at < len(data):  # one bit
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2:  # other bytes
            return data[:at] + rng.randbytes(length) + data[at + length :]
        case 3:  # some missing
            return data[:at] + data[at + length :]
        case 4:  # some more
            return data[:at] + rng.randbytes(rng.choice([1, 2, 8, 64])) + data[at:]
        case 5:  # the end is missing
            return data[:at]
        case 6:  # some twice, or often
            return data[:at] + data[at : at + length] * rng.choice([2, 3, 100]) + data[at + length :]
        case 7:  # a varint that says more than it should
            return data[:at] + rng.choice([b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\x80" * 11]) + data[at + length :]
        case 8:  # a field that nobody knows, of any wire type
            tag = (rng.randrange(1, 5000) << 3) | rng.randrange(8)
            return data + _varint(tag) + rng.randbytes(rng.randint(0, 12))
        case _:  # nested ever deeper
            for _ in range(rng.choice([1, 3, 30, 120])):
                data = b"\x12" + _varint(len(data)) + data
            return data


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
