"""The door: what a caller wrote becomes requests that the engine can trust, or is refused with every reason at once.

Cheap checks come first: the number of inputs, then bytes and characters of all of them and the options, before anything is
tokenised; then tokens, before anything reaches the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from server.batch.constraints import RequiredPhrases
from server.edge.validation import (
    MAX_PHRASE_TOKENS,
    MAX_PHRASES,
    Complaints,
    check_attention,
    check_count,
    check_decoding,
    check_ids,
    check_phrase,
    check_text,
    check_weights,
    check_writable,
    fit_to_context,
)
from server.models import ServedModel
from server.requests import Attention, Decoding, DecodingOptions, EncodingRequest, GenerationRequest

Given = str | tuple[int, ...] | None
"""An input as a caller wrote it: text, token ids, or neither."""

_INLINE_CHARACTERS = 4096
"""More text than this is tokenised in a thread, so that no other call waits for it."""
_SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class _Named:
    """An input and the name by which complaints speak of it."""

    where: str
    given: Given

    @property
    def field(self) -> str:
        return f"{self.where}.text" if isinstance(self.given, str) else f"{self.where}.tokens"


class Door:
    """The way in to one model."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._limits = model.limits
        self._tokenizer = model.tokenizer
        self._has_encoder = model.family != "decoder_only"
        self._numbers = itertools.count(1)

    async def check_generation(
        self,
        call_id: str,
        inputs: Sequence[Given],
        options: DecodingOptions,
        *,
        target_prefix: str = "",
        stream: bool = False,
        attention: Attention | None = Attention.NONE,
    ) -> list[GenerationRequest]:
        """One request for each input. Raises InvalidRequest.

        Args:
            attention: None for what the caller wrote where it is nothing that is known.
        """
        check_count(len(inputs), self._limits, "inputs")
        complaints = Complaints()
        named = self._check_texts("inputs[{}]", inputs, complaints)
        decoding = check_decoding(
            options,
            self._limits,
            self._model.defaults,
            complaints,
            vocab_size=self._model.vocab_size,
            writable=self._model.writable,
            end_token=self._tokenizer.EOS,
            random_seed=secrets.randbits(53),
        )
        check_attention(attention, decoding, self._model.can_align, "return_attention", complaints)
        if target_prefix and not self._has_encoder:
            complaints.refuse("target_prefix", f"must be empty for a {self._model.family} model: write it in the input")
        elif target_prefix:
            check_text(target_prefix, self._limits, "target_prefix", complaints, may_be_blank=True)
        phrases = self._check_texts("options.required_phrases[{}]", options.required_phrases[:MAX_PHRASES], complaints)
        complaints.close()

        all_ids = await self._encode(named, self._encode_input)
        forced = tuple(self._tokenizer.encode_text(target_prefix)) if target_prefix else ()
        check_writable(forced, self._model.writable, "target_prefix", complaints)
        if len(forced) >= decoding.max_tokens:
            complaints.refuse("target_prefix", f"has {len(forced)} tokens, too many for a max_tokens of {decoding.max_tokens}")
        decoding = replace(decoding, required_phrases=await self._encode_phrases(phrases, decoding, complaints))
        # What may not be the next token: what is suppressed, what would end the text, and after a prefix any n-gram's last one.
        excluded = len(decoding.adjustments.suppressed_tokens) + len(decoding.stop_tokens) + 1 + len(forced)
        if decoding.alternatives > max(0, len(self._model.writable) - excluded):
            complaints.refuse("options.alternatives", "leave too few tokens to choose from")
        requests = []
        for position, (one, ids) in enumerate(zip(named, all_ids, strict=True)):
            check_ids(ids, self._limits.max_input_tokens, self._model.vocab_size, one.field, complaints)
            own = _with_seed(decoding, position)
            if not self._has_encoder:
                asked = options.max_tokens is not None
                own = fit_to_context(own, len(ids), self._limits, one.field, complaints, asked=asked)
            request_id = self._request_id(call_id)
            requests.append(
                GenerationRequest(
                    id=request_id,
                    input_ids=ids,
                    decoding=own,
                    forced=forced,
                    stream=stream,
                    attention=attention or Attention.NONE,
                )
            )
        outputs = max(decoding.hypotheses, decoding.alternatives)
        check_weights([(outputs * len(ids), decoding.max_tokens) for ids in all_ids], attention, "return_attention", complaints)
        if phrases and not complaints.violations:
            need, room = _tokens_needed(requests[0]), min(request.decoding.max_tokens for request in requests) - len(forced)
            if need > room:
                complaints.refuse(
                    "options.required_phrases", f"need {need} tokens, more than the {room} an output has for them"
                )
        complaints.close()
        return requests

    async def check_scoring(
        self, call_id: str, pairs: Sequence[tuple[Given, Given]], *, attention: Attention | None = Attention.NONE
    ) -> list[GenerationRequest]:
        """One request for each (source, target), which is all forced. Raises InvalidRequest."""
        check_count(len(pairs), self._limits, "pairs")
        complaints = Complaints()
        sources = self._check_texts("pairs[{}].source", [source for source, _ in pairs], complaints)
        targets = self._check_texts("pairs[{}].target", [target for _, target in pairs], complaints)
        check_attention(attention, Decoding(max_tokens=1), self._model.can_align, "return_attention", complaints)
        complaints.close()

        all_source_ids = await self._encode(sources, self._encode_input)
        all_target_ids = await self._encode(targets, self._encode_target)
        requests = []
        for source, ids, target, forced in zip(sources, all_source_ids, targets, all_target_ids, strict=True):
            check_ids(ids, self._limits.max_input_tokens, self._model.vocab_size, source.field, complaints)
            longest = self._limits.max_output_tokens - (0 if self._has_encoder else len(ids))
            check_ids(forced, max(0, longest), self._model.vocab_size, target.field, complaints)
            check_writable(forced, self._model.writable, target.field, complaints)
            decoding = Decoding(max_tokens=max(1, len(forced)))
            requests.append(
                GenerationRequest(
                    id=self._request_id(call_id),
                    input_ids=ids,
                    decoding=decoding,
                    forced=forced,
                    forced_only=True,
                    attention=attention or Attention.NONE,
                )
            )
        lengths = [(len(request.input_ids), len(request.forced)) for request in requests]
        check_weights(lengths, attention, "return_attention", complaints)
        complaints.close()
        return requests

    async def check_encoding(self, call_id: str, inputs: Sequence[Given]) -> list[EncodingRequest]:
        """One request for each input. Raises InvalidRequest."""
        check_count(len(inputs), self._limits, "inputs")
        complaints = Complaints()
        named = self._check_texts("inputs[{}]", inputs, complaints)
        complaints.close()
        all_ids = await self._encode(named, self._encode_input)
        for one, ids in zip(named, all_ids, strict=True):
            check_ids(ids, self._limits.max_input_tokens, self._model.vocab_size, one.field, complaints)
        complaints.close()
        return [EncodingRequest(id=self._request_id(call_id), input_ids=ids) for ids in all_ids]

    async def tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids of each text as the model is fed, however many. Raises InvalidRequest."""
        check_count(len(texts), self._limits, "texts")
        complaints = Complaints()
        for position, text in enumerate(texts):
            check_text(text, self._limits, f"texts[{position}]", complaints)
        complaints.close()
        return await self._encode([_Named("texts", text) for text in texts], self._encode_input)

    def _check_texts(self, where: str, inputs: Sequence[Given], complaints: Complaints) -> list[_Named]:
        named = [_Named(where.format(position), given) for position, given in enumerate(inputs)]
        for one in named:
            if one.given is None:
                complaints.refuse(one.where, "must have text or tokens")
            elif isinstance(one.given, str):
                check_text(one.given, self._limits, one.field, complaints)
            elif not one.given:
                complaints.refuse(one.field, "must not be empty")
        return named

    async def _encode(self, inputs: Sequence[_Named], encode: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
        """Ids of texts; ids that were given stay as they are."""

        def work() -> list[tuple[int, ...]]:
            return [tuple(encode(one.given)) if isinstance(one.given, str) else one.given or () for one in inputs]

        if sum(len(one.given) for one in inputs if isinstance(one.given, str)) > _INLINE_CHARACTERS:
            return await asyncio.to_thread(work)
        return work()

    async def _encode_phrases(
        self, phrases: Sequence[_Named], decoding: Decoding, complaints: Complaints
    ) -> tuple[tuple[int, ...], ...]:
        encoded = await self._encode(phrases, self._tokenizer.encode_text)
        for phrase, ids in zip(phrases, encoded, strict=True):
            check_phrase(ids, decoding, self._tokenizer.EOS, self._model.vocab_size, phrase.field, complaints)
            check_writable(ids, self._model.writable, phrase.field, complaints)
            if isinstance(phrase.given, str) and self._tokenizer.UNK in ids:
                complaints.refuse(phrase.field, "has characters that the model cannot write")
        if (total := sum(map(len, encoded))) > MAX_PHRASE_TOKENS:
            complaints.refuse("options.required_phrases", f"has {total} tokens, more than the limit of {MAX_PHRASE_TOKENS}")
        return tuple(dict.fromkeys(encoded))

    def _encode_input(self, text: str) -> list[int]:
        return self._tokenizer.encode_source(text) if self._has_encoder else self._tokenizer.encode_text(text)

    def _encode_target(self, text: str) -> list[int]:
        ids = self._tokenizer.encode_text(text)
        return [*ids, self._tokenizer.EOS] if self._has_encoder else ids

    def _request_id(self, call_id: str) -> str:
        """Unique in the engine, even where two callers chose the same id for their calls."""
        return f"{call_id}#{next(self._numbers)}"


def _tokens_needed(request: GenerationRequest) -> int:
    """Tokens after the forced prefix that certainly suffice for the required phrases."""
    phrases = RequiredPhrases(request.decoding.required_phrases, members=1)
    for token in request.forced:
        phrases.write(0, token)
    return phrases.need(0)


def _with_seed(decoding: Decoding, position: int) -> Decoding:
    """Input i of a call draws with seed + i, so that equal inputs differ and each can be repeated alone."""
    if decoding.sampling is None or position == 0:
        return decoding
    return replace(decoding, sampling=replace(decoding.sampling, seed=(decoding.sampling.seed + position) % _SEEDS))
