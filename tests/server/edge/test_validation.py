from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.edge.validation import Complaints, check_count, check_decoding, check_ids, check_text, fit_to_context
from server.requests import (
    Adjustments,
    Decoding,
    DecodingOptions,
    GenerationDefaults,
    InvalidRequest,
    Limits,
    SamplingOptions,
)

LIMITS = Limits(max_inputs=3, max_text_bytes=10, max_input_tokens=4, max_output_tokens=20, max_beams=8)
DEFAULTS = GenerationDefaults(beams=5, length_penalty=0.6, max_tokens=12)
MODEL: dict[str, Any] = {"vocab_size": 100, "writable": range(100), "end_token": 2, "random_seed": 7}


_FLOATS = st.floats(allow_subnormal=False)  # ONNX Runtime, once loaded by another test, flushes them to zero


def complaints_about(options: DecodingOptions) -> dict[str, str]:
    complaints = Complaints()
    check_decoding(options, LIMITS, DEFAULTS, complaints, **MODEL)
    return {violation.field: violation.description for violation in complaints.violations}


def accepted(options: DecodingOptions) -> Decoding:
    complaints = Complaints()
    decoding = check_decoding(options, LIMITS, DEFAULTS, complaints, **MODEL)
    complaints.close()
    return decoding


def test_absent_options_take_the_models_defaults() -> None:
    assert accepted(DecodingOptions()) == Decoding(max_tokens=12, beams=5, length_penalty=0.6)


def test_a_default_length_beyond_the_limit_is_shortened() -> None:
    complaints = Complaints()
    long = GenerationDefaults(max_tokens=500)
    assert check_decoding(DecodingOptions(), LIMITS, long, complaints, **MODEL).max_tokens == 20
    assert not complaints.violations


def test_sampling_needs_one_beam_and_gets_the_random_seed() -> None:
    decoding = accepted(DecodingOptions(sampling=SamplingOptions(), hypotheses=8))
    assert decoding.sampling is not None
    assert (decoding.beams, decoding.rows, decoding.sampling.seed) == (1, 8, 7)
    assert set(complaints_about(DecodingOptions(beams=2, sampling=SamplingOptions()))) == {"options.beams"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (DecodingOptions(beams=0), "options.beams"),
        (DecodingOptions(beams=9), "options.beams"),
        (DecodingOptions(beams=2**32 - 1), "options.beams"),
        (DecodingOptions(beams=2, hypotheses=3), "options.hypotheses"),
        (DecodingOptions(hypotheses=0), "options.hypotheses"),
        (DecodingOptions(max_tokens=0), "options.max_tokens"),
        (DecodingOptions(max_tokens=21), "options.max_tokens"),
        (DecodingOptions(max_tokens=5, min_tokens=6), "options.min_tokens"),
        (DecodingOptions(length_penalty=math.nan), "options.length_penalty"),
        (DecodingOptions(length_penalty=math.inf), "options.length_penalty"),
        (DecodingOptions(length_penalty=-0.1), "options.length_penalty"),
        (DecodingOptions(patience=0.0), "options.patience"),
        (DecodingOptions(sampling=SamplingOptions(temperature=0.0)), "options.sampling.temperature"),
        (DecodingOptions(sampling=SamplingOptions(temperature=math.nan)), "options.sampling.temperature"),
        (DecodingOptions(sampling=SamplingOptions(top_p=0.0)), "options.sampling.top_p"),
        (DecodingOptions(sampling=SamplingOptions(top_p=1.1)), "options.sampling.top_p"),
        (DecodingOptions(sampling=SamplingOptions(top_k=2**31)), "options.sampling.top_k"),
        (DecodingOptions(sampling=SamplingOptions(), hypotheses=9), "options.hypotheses"),
        (DecodingOptions(sampling=SamplingOptions(min_p=1.1)), "options.sampling.min_p"),
        (DecodingOptions(repetition_penalty=0.0), "options.repetition_penalty"),
        (DecodingOptions(repetition_penalty=math.inf), "options.repetition_penalty"),
        (DecodingOptions(frequency_penalty=2.1), "options.frequency_penalty"),
        (DecodingOptions(presence_penalty=-2.1), "options.presence_penalty"),
        (DecodingOptions(no_repeat_ngram=21), "options.no_repeat_ngram"),
        (DecodingOptions(token_bias=((100, 1.0),)), "options.token_bias"),
        (DecodingOptions(token_bias=((7, 1.0), (7, 2.0))), "options.token_bias"),
        (DecodingOptions(token_bias=((7, 1.0), (8, 100.1))), "options.token_bias[1].bias"),
        (DecodingOptions(token_bias=tuple((i % 100, 0.0) for i in range(1025))), "options.token_bias"),
        (DecodingOptions(suppressed_tokens=(5, 100)), "options.suppressed_tokens"),
        (DecodingOptions(suppressed_tokens=(5,) * 1025), "options.suppressed_tokens"),
        (DecodingOptions(suppressed_tokens=tuple(range(100))), "options.suppressed_tokens"),
        (DecodingOptions(suppressed_tokens=(*range(2, 100),), stop_tokens=(0, 1), min_tokens=1), "options.suppressed_tokens"),
        (DecodingOptions(beams=4, alternatives=3), "options.alternatives"),
        (DecodingOptions(beams=1, alternatives=9), "options.alternatives"),
        (DecodingOptions(beams=2, alternatives=2, hypotheses=2), "options.hypotheses"),
        (DecodingOptions(beams=1, required_phrases=("a",)), "options.beams"),
        (DecodingOptions(required_phrases=("a",) * 17), "options.required_phrases"),
        (DecodingOptions(required_phrases=("a",), no_repeat_ngram=2), "options.no_repeat_ngram"),
        (DecodingOptions(required_phrases=("a",), stop_strings=("b",)), "options.stop_strings"),
        (DecodingOptions(required_phrases=("a",), alternatives=1), "options.alternatives"),
        (DecodingOptions(required_phrases=("a",), sampling=SamplingOptions()), "options.sampling"),
        (DecodingOptions(stop_tokens=(100,)), "options.stop_tokens"),
        (DecodingOptions(stop_tokens=tuple(range(17))), "options.stop_tokens"),
        (DecodingOptions(stop_strings=("a", "")), "options.stop_strings[1]"),
        (DecodingOptions(stop_strings=("é" * 129,)), "options.stop_strings[0]"),
        (DecodingOptions(stop_strings=("a\0",)), "options.stop_strings[0]"),
        (DecodingOptions(stop_strings=("\ufffd",)), "options.stop_strings[0]"),
        (DecodingOptions(stop_strings=("a",) * 17), "options.stop_strings"),
    ],
)
def test_an_option_out_of_bounds_is_refused_by_its_own_name_alone(options: DecodingOptions, field: str) -> None:
    assert set(complaints_about(options)) == {field}


def test_every_option_reaches_the_engine_without_doubles() -> None:
    decoding = accepted(
        DecodingOptions(
            repetition_penalty=1.5,
            frequency_penalty=-2.0,
            presence_penalty=2.0,
            no_repeat_ngram=3,
            token_bias=((7, -100.0), (8, 1.5)),
            suppressed_tokens=(9, 9, 2),
            ignore_end_of_text=True,
            stop_tokens=(5, 4, 5),
            stop_strings=("\n", "é" * 128, "\n"),
            sampling=SamplingOptions(min_p=0.1),
            beams=1,
        )
    )
    assert decoding.adjustments == Adjustments(
        repetition_penalty=1.5,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        no_repeat_ngram=3,
        token_bias=((7, -100.0), (8, 1.5)),
        suppressed_tokens=(9, 2),
    )
    assert (decoding.stop_tokens, decoding.stop_strings) == ((5, 4), ("\n", "é" * 128))
    assert decoding.sampling is not None
    assert decoding.sampling.min_p == 0.1
    assert accepted(DecodingOptions(ignore_end_of_text=True)).adjustments.suppressed_tokens == (2,)


def test_all_wrong_options_are_named_at_once_with_their_limits() -> None:
    found = complaints_about(DecodingOptions(beams=99, max_tokens=99, length_penalty=99.0))
    assert found == {
        "options.beams": "must be between 1 and 8, not 99",
        "options.max_tokens": "must be between 1 and 20, not 99",
        "options.length_penalty": "must be between 0 and 10, not 99",
    }


@given(
    st.builds(
        DecodingOptions,
        beams=st.none() | st.integers(0, 2**32 - 1),
        hypotheses=st.none() | st.integers(0, 2**32 - 1),
        length_penalty=st.none() | _FLOATS,
        max_tokens=st.none() | st.integers(0, 2**32 - 1),
        min_tokens=st.none() | st.integers(0, 2**32 - 1),
        patience=st.none() | _FLOATS,
        alternatives=st.none() | st.integers(0, 2**32 - 1),
        sampling=st.none()
        | st.builds(
            SamplingOptions,
            temperature=st.none() | _FLOATS,
            top_k=st.none() | st.integers(0, 2**32 - 1),
            top_p=st.none() | _FLOATS,
            seed=st.none() | st.integers(0, 2**64 - 1),
        ),
    )
)
def test_whatever_passes_is_within_every_bound(options: DecodingOptions) -> None:
    try:
        decoding = accepted(options)
    except InvalidRequest:
        return
    assert 1 <= decoding.hypotheses <= decoding.rows <= LIMITS.max_beams
    assert 0 <= decoding.min_tokens <= decoding.max_tokens <= LIMITS.max_output_tokens
    assert math.isfinite(decoding.length_penalty)
    assert decoding.patience > 0
    if decoding.sampling is not None:
        assert 0 < decoding.sampling.temperature < math.inf
        assert 0 < decoding.sampling.top_p <= 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must not be empty or blank"),
        (" \t\n", "must not be empty or blank"),
        ("a\0b", "must not contain a NUL character"),
        ("äöüäöü", "has 12 bytes, more than the limit of 10"),
        (" " * 11, "has 11 bytes, more than the limit of 10"),
        ("fine", None),
    ],
)
def test_texts(text: str, complaint: str | None) -> None:
    complaints = Complaints()
    check_text(text, LIMITS, "t", complaints)
    assert [violation.description for violation in complaints.violations] == ([complaint] if complaint else [])


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ((), "must not be empty"),
        ((1, 2, 3, 4, 5), "has 5 tokens, more than the limit of 4"),
        ((1, 30), "token id 30 is not in the vocabulary of 30"),
        ((0, 29), None),
    ],
)
def test_ids(ids: tuple[int, ...], complaint: str | None) -> None:
    complaints = Complaints()
    check_ids(ids, LIMITS.max_input_tokens, 30, "ids", complaints)
    assert [violation.description for violation in complaints.violations] == ([complaint] if complaint else [])


@pytest.mark.parametrize("count", [0, 4])
def test_counts(count: int) -> None:
    with pytest.raises(InvalidRequest, match="^inputs: "):
        check_count(count, LIMITS, "inputs")


def test_a_prompt_and_its_output_share_the_context() -> None:
    decoding = Decoding(max_tokens=12, min_tokens=3)

    def fit(prompt: int, *, asked: bool) -> tuple[int, bool]:
        complaints = Complaints()
        fitted = fit_to_context(decoding, prompt, LIMITS, "inputs[0].text", complaints, asked=asked)
        return fitted.max_tokens, not complaints.violations

    assert fit(8, asked=True) == (12, True)
    assert fit(9, asked=True) == (12, False)
    assert fit(9, asked=False) == (11, True)
    assert fit(17, asked=False) == (3, True)
    assert fit(18, asked=False) == (12, False), "less room than min_tokens"
