"""Between the client's types and protobuf, for the asynchronous and the synchronous client alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import grpc

from protos import transformer_pb2 as pb
from server.client.errors import CallError, FieldViolation
from server.client.types import (
    Attention,
    Classification,
    ClassProbability,
    Embedding,
    Generation,
    Hypothesis,
    Input,
    ModelInfo,
    ModelLimits,
    Options,
    Sampling,
    Score,
    StreamedGeneration,
    StreamedText,
    Token,
    Tokenization,
)

T = TypeVar("T")

_BUILT = ("sampling", "token_bias", "required_phrases")
"""The options that are messages of their own."""
_DEFAULTS = ("beams", "hypotheses", "length_penalty", "max_tokens", "min_tokens", "patience")
"""The options of which a model tells what absent ones become."""
_ATTENTION: dict[Attention, pb.Attention] = {
    "": pb.ATTENTION_UNSPECIFIED,
    "alignment": pb.ATTENTION_ALIGNMENT,
    "weights": pb.ATTENTION_WEIGHTS,
}
_FINISH_REASONS = {
    pb.FINISH_REASON_END_OF_TEXT: "end_of_text",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_STOP: "stop",
}


# What is sent


def generate_request(
    model: str,
    inputs: Sequence[Input],
    options: Options | None,
    target_prefix: str,
    return_tokens: bool,
    attention: Attention,
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=_text(model, "model"),
        inputs=inputs_of(inputs, "inputs"),
        options=_options(options) if options else None,
        target_prefix=_text(target_prefix, "target_prefix"),
        return_tokens=return_tokens,
        return_attention=_ATTENTION[attention],
    )


def score_request(
    model: str, pairs: Sequence[tuple[Input, Input]], return_tokens: bool, attention: Attention
) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        model=_text(model, "model"),
        pairs=[
            pb.ScorePair(source=_input(source, f"pairs[{i}].source"), target=_input(target, f"pairs[{i}].target"))
            for i, (source, target) in enumerate(pairs)
        ],
        return_tokens=return_tokens,
        return_attention=_ATTENTION[attention],
    )


def tokenize_request(model: str, texts: Sequence[str]) -> pb.TokenizeRequest:
    return pb.TokenizeRequest(
        model=_text(model, "model"), texts=[_text(text, f"texts[{i}]") for i, text in enumerate(_several(texts, "texts"))]
    )


def inputs_of(inputs: Sequence[Input], where: str) -> list[pb.Input]:
    return [_input(one, f"{where}[{i}]") for i, one in enumerate(_several(inputs, where))]


def _several(values: Sequence[T], where: str) -> Sequence[T]:
    if isinstance(values, str):
        raise TypeError(f"{where} must be a list of texts, not one text")
    return values


def _input(value: Input, where: str) -> pb.Input:
    if isinstance(value, str):
        return pb.Input(text=_text(value, f"{where}.text"))
    try:
        return pb.Input(tokens=pb.TokenIds(ids=value))
    except ValueError as error:
        raise _invalid(f"{where}.tokens", str(error)) from None


def _text(value: str, where: str) -> str:
    """Half a surrogate pair is no character, and protobuf refuses it without naming the field."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid(where, f"is not valid Unicode at character {error.start}") from None
    return value


def _options(options: Options) -> pb.GenerationOptions:
    values = {name: getattr(options, name) for name in Options.__slots__ if name not in _BUILT}
    sampling = options.sampling
    for place, stop in enumerate(_several(options.stop_strings, "options.stop_strings")):
        _text(stop, f"options.stop_strings[{place}]")
    try:
        return pb.GenerationOptions(
            **values,
            required_phrases=inputs_of(options.required_phrases, "options.required_phrases"),
            token_bias=[pb.TokenBias(id=token, bias=bias) for token, bias in (options.token_bias or {}).items()],
            sampling=pb.Sampling(**{name: getattr(sampling, name) for name in Sampling.__slots__}) if sampling else None,
        )
    except ValueError as error:  # a negative count, for example
        raise _invalid("options", str(error)) from None


def _invalid(where: str, description: str) -> CallError:
    return CallError(
        grpc.StatusCode.INVALID_ARGUMENT, f"{where}: {description}", violations=(FieldViolation(where, description),)
    )


# What comes back


def generation(message: pb.GenerateResult) -> Generation:
    return Generation(
        hypotheses=tuple(
            Hypothesis(
                text=h.text,
                log_probability=h.log_probability,
                score=h.score,
                finish_reason=_FINISH_REASONS.get(h.finish_reason, "unknown"),
                token_count=h.token_count,
                tokens=_tokens(h.tokens),
                alignment=tuple(h.alignment),
                attention=_attention(h.attention),
            )
            for h in message.hypotheses
        ),
        input_token_count=message.input_token_count,
        seed=message.seed if message.HasField("seed") else None,
    )


def streamed(message: pb.GenerateStreamResponse) -> StreamedText | StreamedGeneration:
    if message.WhichOneof("event") == "result":
        return StreamedGeneration(input=message.input, generation=generation(message.result))
    delta = message.delta
    return StreamedText(input=message.input, hypothesis=delta.hypothesis, text=delta.text, tokens=_tokens(delta.tokens))


def classification(message: pb.ClassifyResult) -> Classification:
    return Classification(
        classes=tuple(ClassProbability(label=c.label, probability=c.probability) for c in message.classes),
        input_token_count=message.input_token_count,
    )


def embedding(message: pb.EmbedResult) -> Embedding:
    return Embedding(vector=tuple(message.vector), input_token_count=message.input_token_count)


def score(message: pb.ScoreResult) -> Score:
    return Score(
        log_probability=message.log_probability,
        token_count=message.token_count,
        tokens=_tokens(message.tokens),
        alignment=tuple(message.alignment),
        attention=_attention(message.attention),
    )


def tokenization(message: pb.Tokenization) -> Tokenization:
    return Tokenization(ids=tuple(message.ids), pieces=tuple(message.pieces))


def model_info(message: pb.Model) -> ModelInfo:
    limits, defaults = message.limits, message.default_options
    return ModelInfo(
        name=message.name,
        family=message.family,
        task=message.task,
        precision=message.precision,
        device=message.device,
        fingerprint=message.fingerprint,
        parameters=message.parameters,
        limits=ModelLimits(**{name: getattr(limits, name) for name in ModelLimits.__slots__}),
        default_options=Options(**{name: getattr(defaults, name) for name in _DEFAULTS if defaults.HasField(name)}),
        labels=tuple(message.labels),
        parity_certificate=message.parity_certificate,
        can_align=message.can_align,
        shortlist_size=message.shortlist_size,
    )


def _attention(rows: Iterable[pb.AttentionWeights]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row.weights) for row in rows)


def _tokens(messages: Iterable[pb.Token]) -> tuple[Token, ...]:
    return tuple(Token(id=token.id, log_probability=token.log_probability) for token in messages)
