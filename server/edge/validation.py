"""The checks a call must pass, one concern each. Pure: no clock, no I/O, no gRPC; ``server.edge.door`` puts them in order."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from server.requests import (
    MAX_STOP_TOKENS,
    Adjustments,
    Attention,
    Decoding,
    DecodingOptions,
    GenerationDefaults,
    InvalidRequest,
    Limits,
    Sampling,
    SamplingOptions,
    Violation,
)

T = TypeVar("T")

_MAX_LENGTH_PENALTY = 10.0
_MAX_PATIENCE = 10.0
_MAX_COVERAGE_PENALTY = 10.0
_MAX_WEIGHTS = 2**18
"""Attention weights that one call may ask for: a megabyte."""
_TEMPERATURES = (0.01, 100.0)
_REPETITION_PENALTIES = (0.01, 100.0)
_PENALTIES = (-2.0, 2.0)
_BIASES = (-100.0, 100.0)
_MAX_LISTED_TOKENS = 1024
_MAX_STOP_STRINGS = 16
_MAX_STOP_BYTES = 256
_COVERAGE = "options.coverage_penalty"
MAX_PHRASES = 16
MAX_PHRASE_TOKENS = 64
"""Of all required phrases together."""


class Complaints:
    """Collects violations, so that a caller learns all of them at once.

    A number that fails its check is replaced by one that passes, so that the checks after it can go on.
    """

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def refuse(self, where: str, description: str) -> None:
        self.violations.append(Violation(where, description))

    def whole(self, where: str, value: int, low: int, high: int) -> int:
        if not low <= value <= high:
            self.refuse(where, f"must be between {low} and {high}, not {value}")
        return min(max(value, low), high)

    def real(self, where: str, value: float, low: float, high: float, *, above: bool = False) -> float:
        """``above``: low itself is refused. NaN and infinity always are."""
        if not math.isfinite(value) or not (low < value if above else low <= value) or value > high:
            bound = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
            self.refuse(where, f"must be {bound}, not {value:g}")
            return high
        return value

    def close(self) -> None:
        """Raises InvalidRequest when there was anything to complain about."""
        if self.violations:
            raise InvalidRequest(self.violations)


def check_count(count: int, limits: Limits, where: str) -> None:
    """Comes before everything that takes time for each input, so it refuses alone."""
    complaints = Complaints()
    if not count:
        complaints.refuse(where, "must not be empty")
    elif count > limits.max_inputs:
        complaints.refuse(where, f"has {count} elements, more than the limit of {limits.max_inputs}")
    complaints.close()


def check_text(text: str, limits: Limits, where: str, complaints: Complaints, *, may_be_blank: bool = False) -> None:
    """Bytes come before tokens: a text too long to tokenise is refused before the tokenizer sees it."""
    size = len(text.encode("utf-8", errors="surrogatepass"))
    if size > limits.max_text_bytes:
        complaints.refuse(where, f"has {size} bytes, more than the limit of {limits.max_text_bytes}")
    elif not may_be_blank and not text.strip():
        complaints.refuse(where, "must not be empty or blank")
    elif "\0" in text:
        complaints.refuse(where, "must not contain a NUL character")


def check_ids(ids: Sequence[int], longest: int, vocab_size: int, where: str, complaints: Complaints) -> None:
    if not ids:
        complaints.refuse(where, "must not be empty")
    elif len(ids) > longest:
        complaints.refuse(where, f"has {len(ids)} tokens, more than the limit of {longest}")
    elif strangers := [i for i in ids if not 0 <= i < vocab_size]:
        complaints.refuse(where, f"token id {strangers[0]} is not in the vocabulary of {vocab_size}")


def check_writable(ids: Sequence[int], writable: Collection[int], where: str, complaints: Complaints) -> None:
    """An output that must contain what the model cannot write: the bundle's shortlist leaves it out. After ``check_ids``."""
    if strangers := [i for i in ids if i not in writable]:
        complaints.refuse(where, f"contains token id {strangers[0]}, which is not in the model's shortlist of {len(writable)}")


def check_decoding(
    options: DecodingOptions,
    limits: Limits,
    defaults: GenerationDefaults,
    complaints: Complaints,
    *,
    vocab_size: int,
    writable: Collection[int],
    end_token: int,
    random_seed: int,
) -> Decoding:
    """Turns a caller's options into a Decoding; the engine can trust it once ``complaints`` are closed.

    Args:
        writable: the tokens that the model may write.
        random_seed: the seed that a sampling request without one gets.
    """
    sampling = None
    if options.sampling is not None:
        sampling = _check_sampling(options.sampling, complaints, random_seed)
        beams = 1
        if options.beams not in (None, 1):
            complaints.refuse("options.beams", f"must be 1 (or absent) when sampling is set, not {options.beams}")
    else:
        beams = complaints.whole("options.beams", _given(options.beams, defaults.beams), 1, limits.max_beams)
    max_tokens = _given(options.max_tokens, min(defaults.max_tokens, limits.max_output_tokens))
    max_tokens = complaints.whole("options.max_tokens", max_tokens, 1, limits.max_output_tokens)
    max_hypotheses = limits.max_beams if sampling else beams
    min_tokens = complaints.whole("options.min_tokens", _given(options.min_tokens, 0), 0, max_tokens)
    length_penalty = _given(options.length_penalty, defaults.length_penalty)
    _check_listed("options.stop_tokens", options.stop_tokens, MAX_STOP_TOKENS, vocab_size, complaints)
    _check_stop_strings(options.stop_strings, complaints)
    adjustments = _check_adjustments(options, limits, vocab_size, end_token, complaints)
    may_not_come = {*adjustments.suppressed_tokens, *((end_token, *options.stop_tokens) if min_tokens else ())}
    alternatives = complaints.whole("options.alternatives", _given(options.alternatives, 0), 0, limits.max_beams // beams)
    if alternatives and options.hypotheses not in (None, 1):
        complaints.refuse("options.hypotheses", f"must be 1 (or absent) with alternatives, not {options.hypotheses}")
        max_hypotheses = options.hypotheses or 1
    coverage_penalty = complaints.real(_COVERAGE, _given(options.coverage_penalty, 0.0), 0.0, _MAX_COVERAGE_PENALTY)
    if coverage_penalty and beams < 2:
        complaints.refuse(_COVERAGE, "ranks hypotheses of a beam search: needs beams of at least 2")
    if options.required_phrases:
        _check_constrained_search(options, beams, complaints)
    if all(token in may_not_come for token in writable):
        complaints.refuse("options.suppressed_tokens", "with min_tokens and stop_tokens, leave no token to choose")
    return Decoding(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        beams=beams,
        hypotheses=complaints.whole("options.hypotheses", _given(options.hypotheses, 1), 1, max_hypotheses),
        length_penalty=complaints.real("options.length_penalty", length_penalty, 0.0, _MAX_LENGTH_PENALTY),
        coverage_penalty=coverage_penalty,
        patience=complaints.real("options.patience", _given(options.patience, 1.0), 0.0, _MAX_PATIENCE, above=True),
        sampling=sampling,
        adjustments=adjustments,
        stop_tokens=tuple(dict.fromkeys(options.stop_tokens)),
        stop_strings=tuple(dict.fromkeys(options.stop_strings)),
        alternatives=alternatives,
    )


def _check_constrained_search(options: DecodingOptions, beams: int, complaints: Complaints) -> None:
    """What would not let the search keep its promise that every output contains every phrase."""
    if len(options.required_phrases) > MAX_PHRASES:
        count = len(options.required_phrases)
        complaints.refuse("options.required_phrases", f"has {count} elements, more than the limit of {MAX_PHRASES}")
    if options.sampling is not None:
        complaints.refuse("options.sampling", "must be absent with required_phrases: they need a beam search")
    elif beams < 2:
        complaints.refuse("options.beams", f"must be at least 2 with required_phrases, not {beams}")
    for name in ("no_repeat_ngram", "stop_strings", "alternatives"):
        if getattr(options, name):
            complaints.refuse(f"options.{name}", "must be absent with required_phrases")


def check_phrase(
    phrase: Sequence[int], decoding: Decoding, end_token: int, vocab_size: int, where: str, complaints: Complaints
) -> None:
    check_ids(phrase, decoding.max_tokens, vocab_size, where, complaints)
    never = {end_token, *decoding.stop_tokens, *decoding.adjustments.suppressed_tokens}
    if barred := [token for token in phrase if token in never]:
        complaints.refuse(where, f"contains token {barred[0]}, which is suppressed or ends an output")


def check_attention(
    attention: Attention | None, decoding: Decoding, can_align: bool, where: str, complaints: Complaints
) -> None:
    """What is asked of the attention: a number that is no Attention, or a model that cannot tell."""
    if attention is None:
        complaints.refuse(where, "must be ALIGNMENT or WEIGHTS, or absent")
    for asked, field in ((attention not in (None, Attention.NONE), where), (decoding.coverage_penalty > 0, _COVERAGE)):
        if asked and not can_align:
            complaints.refuse(field, "needs an encoder-decoder that was exported with --alignment, which this model is not")


def check_weights(outputs: Sequence[tuple[int, int]], attention: Attention | None, where: str, complaints: Complaints) -> None:
    """Args: outputs: of all outputs of a call, source tokens and longest output."""
    count = sum(source * output for source, output in outputs)
    if attention is Attention.WEIGHTS and count > _MAX_WEIGHTS:
        complaints.refuse(where, f"may need {count} weights, more than the limit of {_MAX_WEIGHTS}: lower max_tokens")


def _check_adjustments(
    options: DecodingOptions, limits: Limits, vocab_size: int, end_token: int, complaints: Complaints
) -> Adjustments:
    suppressed = options.suppressed_tokens
    _check_listed("options.suppressed_tokens", suppressed, _MAX_LISTED_TOKENS, vocab_size, complaints)
    biased = [token for token, _ in options.token_bias]
    _check_listed("options.token_bias", biased, _MAX_LISTED_TOKENS, vocab_size, complaints)
    if len(set(biased)) < len(biased):
        complaints.refuse("options.token_bias", "must name each token once")
    for place, (_, bias) in enumerate(options.token_bias[:_MAX_LISTED_TOKENS]):
        complaints.real(f"options.token_bias[{place}].bias", bias, *_BIASES)
    repetition = _given(options.repetition_penalty, 1.0)
    ngram = _given(options.no_repeat_ngram, 0)
    return Adjustments(
        repetition_penalty=complaints.real("options.repetition_penalty", repetition, *_REPETITION_PENALTIES),
        frequency_penalty=complaints.real("options.frequency_penalty", _given(options.frequency_penalty, 0.0), *_PENALTIES),
        presence_penalty=complaints.real("options.presence_penalty", _given(options.presence_penalty, 0.0), *_PENALTIES),
        token_bias=options.token_bias,
        no_repeat_ngram=complaints.whole("options.no_repeat_ngram", ngram, 0, limits.max_output_tokens),
        suppressed_tokens=tuple(dict.fromkeys((*suppressed, *((end_token,) if options.ignore_end_of_text else ())))),
    )


def _check_listed(where: str, ids: Sequence[int], most: int, vocab_size: int, complaints: Complaints) -> None:
    if ids:
        check_ids(ids, most, vocab_size, where, complaints)


def _check_stop_strings(stops: Sequence[str], complaints: Complaints) -> None:
    if len(stops) > _MAX_STOP_STRINGS:
        complaints.refuse("options.stop_strings", f"has {len(stops)} elements, more than the limit of {_MAX_STOP_STRINGS}")
        return
    for place, stop in enumerate(stops):
        where = f"options.stop_strings[{place}]"
        if not stop:
            complaints.refuse(where, "must not be empty")
        elif (size := len(stop.encode("utf-8", errors="surrogatepass"))) > _MAX_STOP_BYTES:
            complaints.refuse(where, f"has {size} bytes, more than the limit of {_MAX_STOP_BYTES}")
        elif "\0" in stop or "\ufffd" in stop:
            complaints.refuse(where, "must not contain NUL or U+FFFD")


def _check_sampling(options: SamplingOptions, complaints: Complaints, random_seed: int) -> Sampling:
    where = "options.sampling"
    return Sampling(
        seed=_given(options.seed, random_seed),
        temperature=complaints.real(f"{where}.temperature", _given(options.temperature, 1.0), *_TEMPERATURES),
        top_k=complaints.whole(f"{where}.top_k", _given(options.top_k, 0), 0, 2**31 - 1),
        top_p=complaints.real(f"{where}.top_p", _given(options.top_p, 1.0), 0.0, 1.0, above=True),
        min_p=complaints.real(f"{where}.min_p", _given(options.min_p, 0.0), 0.0, 1.0),
    )


def fit_to_context(
    decoding: Decoding, prompt_tokens: int, limits: Limits, where: str, complaints: Complaints, *, asked: bool
) -> Decoding:
    """A decoder-only model's prompt and output share one context of ``limits.max_output_tokens``.

    Args:
        asked: the caller named the output's length, so one that does not fit is refused; a default one is shortened.
    """
    room = limits.max_output_tokens - prompt_tokens
    if decoding.max_tokens <= room:
        return decoding
    if asked or room < max(1, decoding.min_tokens):
        complaints.refuse(
            where,
            f"has {prompt_tokens} tokens, which with an output of {decoding.max_tokens} exceed the model's context of "
            f"{limits.max_output_tokens}",
        )
        return decoding
    return replace(decoding, max_tokens=room)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
