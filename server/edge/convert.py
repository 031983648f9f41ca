"""Protobuf messages to what the door takes, and results back to messages. Nothing here decides or checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from model.tokenizer import Tokenizer
from protos import transformer_pb2 as pb
from server.batch.stopping import StoppingText, TextStream
from server.edge.door import Given
from server.models import Ability, ServedModel
from server.requests import (
    Attention,
    DecodingOptions,
    Encoded,
    Finished,
    FinishReason,
    GenerationRequest,
    Hypothesis,
    SamplingOptions,
    TokensReady,
)

_FINISH_REASONS = {
    FinishReason.END_OF_TEXT: pb.FINISH_REASON_END_OF_TEXT,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
}


_ATTENTION: dict[pb.Attention, Attention] = {
    pb.ATTENTION_UNSPECIFIED: Attention.NONE,
    pb.ATTENTION_ALIGNMENT: Attention.ALIGNMENT,
    pb.ATTENTION_WEIGHTS: Attention.WEIGHTS,
}


# What callers send


def given_input(message: pb.Input) -> Given:
    match message.WhichOneof("value"):
        case "text":
            return message.text
        case "tokens":
            return tuple(message.tokens.ids)
        case _:
            return None


def decoding_options(message: pb.GenerationOptions) -> DecodingOptions:
    sampling = None
    if message.HasField("sampling"):
        given = message.sampling
        sampling = SamplingOptions(
            temperature=_decimal(given.temperature) if given.HasField("temperature") else None,
            top_k=given.top_k if given.HasField("top_k") else None,
            top_p=_decimal(given.top_p) if given.HasField("top_p") else None,
            min_p=_decimal(given.min_p) if given.HasField("min_p") else None,
            seed=given.seed if given.HasField("seed") else None,
        )
    return DecodingOptions(
        beams=message.beams if message.HasField("beams") else None,
        hypotheses=message.hypotheses if message.HasField("hypotheses") else None,
        length_penalty=_decimal(message.length_penalty) if message.HasField("length_penalty") else None,
        coverage_penalty=_decimal(message.coverage_penalty) if message.HasField("coverage_penalty") else None,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens if message.HasField("min_tokens") else None,
        patience=_decimal(message.patience) if message.HasField("patience") else None,
        sampling=sampling,
        repetition_penalty=_decimal(message.repetition_penalty) if message.HasField("repetition_penalty") else None,
        frequency_penalty=_decimal(message.frequency_penalty) if message.HasField("frequency_penalty") else None,
        presence_penalty=_decimal(message.presence_penalty) if message.HasField("presence_penalty") else None,
        token_bias=tuple((bias.id, _decimal(bias.bias)) for bias in message.token_bias),
        no_repeat_ngram=message.no_repeat_ngram if message.HasField("no_repeat_ngram") else None,
        suppressed_tokens=tuple(message.suppressed_tokens),
        stop_tokens=tuple(message.stop_tokens),
        stop_strings=tuple(message.stop_strings),
        ignore_end_of_text=message.ignore_end_of_text,
        alternatives=message.alternatives if message.HasField("alternatives") else None,
        required_phrases=tuple(given_input(phrase) for phrase in message.required_phrases),
    )


def attention(value: pb.Attention) -> Attention | None:
    """None for a number that is no member."""
    return _ATTENTION.get(value)


def _decimal(value: float) -> float:
    """The number the caller most likely wrote: 0.6 crosses the wire in single precision, as 0.6000000238418579."""
    return float(f"{value:.7g}")


# What callers get


def generate_result(
    finished: Finished, request: GenerationRequest, tokenizer: Tokenizer, *, return_tokens: bool
) -> pb.GenerateResult:
    sampling = request.decoding.sampling
    return pb.GenerateResult(
        hypotheses=[_hypothesis(hypothesis, request, tokenizer, return_tokens) for hypothesis in finished.hypotheses],
        input_token_count=len(request.input_ids),
        seed=sampling.seed if sampling else None,
    )


def _hypothesis(hypothesis: Hypothesis, request: GenerationRequest, tokenizer: Tokenizer, return_tokens: bool) -> pb.Hypothesis:
    if hypothesis.finish_reason is FinishReason.STOP:
        stream = _text_stream(request, tokenizer)
        text = stream.push(hypothesis.tokens) + stream.flush()
    else:
        text = tokenizer.decode(hypothesis.tokens)
    return pb.Hypothesis(
        text=text,
        log_probability=hypothesis.log_probability,
        score=hypothesis.score,
        finish_reason=_FINISH_REASONS[hypothesis.finish_reason],
        token_count=len(hypothesis.tokens),
        tokens=_tokens(hypothesis.tokens, hypothesis.log_probabilities) if return_tokens else (),
        alignment=hypothesis.alignment,
        attention=[pb.AttentionWeights(weights=weights) for weights in hypothesis.attention],
    )


def _text_stream(request: GenerationRequest, tokenizer: Tokenizer) -> TextStream:
    """Begins the text of one output."""
    stream, decoding = tokenizer.stream(), request.decoding
    if decoding.stop_strings or decoding.stop_tokens:
        return StoppingText(stream, decoding.stop_strings, decoding.stop_tokens, quiet=request.quiet)
    return stream


def score_result(finished: Finished, *, return_tokens: bool) -> pb.ScoreResult:
    scored = finished.hypotheses[0]
    return pb.ScoreResult(
        log_probability=scored.log_probability,
        token_count=len(scored.tokens),
        tokens=_tokens(scored.tokens, scored.log_probabilities) if return_tokens else (),
        alignment=scored.alignment,
        attention=[pb.AttentionWeights(weights=weights) for weights in scored.attention],
    )


def classify_result(encoded: Encoded, labels: Sequence[str], input_tokens: int) -> pb.ClassifyResult:
    ranked = sorted(zip(labels, encoded.probabilities, strict=True), key=lambda pair: -pair[1])
    return pb.ClassifyResult(
        classes=[pb.ClassProbability(label=label, probability=probability) for label, probability in ranked],
        input_token_count=input_tokens,
    )


def embed_result(encoded: Encoded, input_tokens: int, *, normalize: bool) -> pb.EmbedResult:
    vector: Iterable[float] = encoded.vector
    length = math.hypot(*encoded.vector)
    if normalize and length > 0:
        vector = [value / length for value in encoded.vector]
    return pb.EmbedResult(vector=vector, input_token_count=input_tokens)


def tokenization(ids: Sequence[int], tokenizer: Tokenizer) -> pb.Tokenization:
    return pb.Tokenization(ids=ids, pieces=tokenizer.pieces(ids))


def model_message(model: ServedModel) -> pb.Model:
    limits, defaults = model.limits, model.defaults
    options = pb.GenerationOptions(
        beams=defaults.beams,
        hypotheses=1,
        length_penalty=defaults.length_penalty,
        max_tokens=min(defaults.max_tokens, limits.max_output_tokens),
        min_tokens=0,
        patience=1.0,
    )
    return pb.Model(
        name=model.name,
        family=model.family,
        task=model.task,
        precision=model.precision,
        device=model.device,
        fingerprint=model.fingerprint,
        parameters=model.parameters,
        limits=pb.Limits(
            max_inputs=limits.max_inputs,
            max_text_bytes=limits.max_text_bytes,
            max_input_tokens=limits.max_input_tokens,
            max_output_tokens=limits.max_output_tokens,
            max_beams=limits.max_beams,
        ),
        default_options=options if Ability.GENERATE in model.abilities else None,
        labels=model.labels,
        parity_certificate=model.certificate,
        shortlist_size=len(model.shortlist or ()),
        can_align=model.can_align,
    )


class StreamedInput:
    """Turns the events of one input of a stream into messages: text as it becomes final, then the result."""

    def __init__(self, position: int, request: GenerationRequest, tokenizer: Tokenizer, *, return_tokens: bool) -> None:
        self._position = position
        self._request = request
        self._tokenizer = tokenizer
        self._return_tokens = return_tokens
        # Under beam search only the prefix on which all hypotheses agree is streamed: it is the best one's.
        streamed = request.decoding.alternatives or (request.decoding.hypotheses if request.decoding.sampling else 1)
        self._texts = [_text_stream(request, tokenizer) for _ in range(streamed)]
        self._sent = [0] * streamed

    def messages(self, event: TokensReady | Finished) -> list[pb.GenerateStreamResponse]:
        if isinstance(event, TokensReady):
            return self._delta(event)
        messages = []
        for index in range(len(self._texts)):
            hypothesis, sent = event.hypotheses[index], self._sent[index]
            rest = TokensReady(index, hypothesis.tokens[sent:], hypothesis.log_probabilities[sent:])
            messages += self._delta(rest, last=True)
        result = generate_result(event, self._request, self._tokenizer, return_tokens=self._return_tokens)
        messages.append(pb.GenerateStreamResponse(input=self._position, result=result))
        return messages

    def _delta(self, ready: TokensReady, *, last: bool = False) -> list[pb.GenerateStreamResponse]:
        """No message when there is nothing to show yet: a character may need several tokens."""
        stream = self._texts[ready.hypothesis]
        self._sent[ready.hypothesis] += len(ready.tokens)
        text = stream.push(ready.tokens) + (stream.flush() if last else "")
        tokens = _tokens(ready.tokens, ready.log_probabilities) if self._return_tokens else []
        if not text and not tokens:
            return []
        delta = pb.Delta(hypothesis=ready.hypothesis, text=text, tokens=tokens)
        return [pb.GenerateStreamResponse(input=self._position, delta=delta)]


def _tokens(ids: Sequence[int], log_probabilities: Sequence[float]) -> list[pb.Token]:
    return [pb.Token(id=i, log_probability=p) for i, p in zip(ids, log_probabilities, strict=True)]
