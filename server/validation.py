"""The checks a call must pass, one concern each. Pure: no clock, no I/O, no gRPC; ``server.door`` puts them in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from server.requests import (
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
_TEMPERATURES = (0.01, 100.0)


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


def check_decoding(
    options: DecodingOptions, limits: Limits, defaults: GenerationDefaults, complaints: Complaints, *, random_seed: int
) -> Decoding:
    """Turns a caller's options into a Decoding; the engine can trust it once ``complaints`` are closed.

    Args:
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
    length_penalty = _given(options.length_penalty, defaults.length_penalty)
    return Decoding(
        max_tokens=max_tokens,
        min_tokens=complaints.whole("options.min_tokens", _given(options.min_tokens, 0), 0, max_tokens),
        beams=beams,
        hypotheses=complaints.whole("options.hypotheses", _given(options.hypotheses, 1), 1, max_hypotheses),
        length_penalty=complaints.real("options.length_penalty", length_penalty, 0.0, _MAX_LENGTH_PENALTY),
        patience=complaints.real("options.patience", _given(options.patience, 1.0), 0.0, _MAX_PATIENCE, above=True),
        sampling=sampling,
    )


def _check_sampling(options: SamplingOptions, complaints: Complaints, random_seed: int) -> Sampling:
    where = "options.sampling"
    return Sampling(
        seed=_given(options.seed, random_seed),
        temperature=complaints.real(f"{where}.temperature", _given(options.temperature, 1.0), *_TEMPERATURES),
        top_k=complaints.whole(f"{where}.top_k", _given(options.top_k, 0), 0, 2**31 - 1),
        top_p=complaints.real(f"{where}.top_p", _given(options.top_p, 1.0), 0.0, 1.0, above=True),
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
