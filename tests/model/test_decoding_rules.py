"""The reference decoder's rules, on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from model.decoding_rules import Rules

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0])


def adjusted(written: list[int], **rules: object) -> list[float]:
    """Logits that make the adjusted distribution; the normalisation is taken off by the last token, which nothing touches."""
    _, log_p = Rules(**rules).distributions(LOGITS, written)  # type: ignore[arg-type]
    return (log_p - log_p[3]).tolist()


def test_the_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    assert adjusted([0, 1, 1], repetition_penalty=2.0) == pytest.approx([1.0, -2.0, 0.5, 0.0])


def test_frequency_counts_and_presence_does_not() -> None:
    assert adjusted([2, 2, 0], frequency_penalty=0.5) == pytest.approx([1.5, -1.0, -0.5, 0.0])
    assert adjusted([2, 2, 0], presence_penalty=0.5) == pytest.approx([1.5, -1.0, 0.0, 0.0])


def test_they_apply_in_order() -> None:
    found = adjusted([0, 0], repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=1.0, token_bias={0: 4.0, 1: -1.0})
    assert found == pytest.approx([2.0 / 2 - 0.5 - 1.0 + 4.0, -2.0, 0.5, 0.0])


def test_what_is_forbidden_leaves_the_others_their_probability() -> None:
    own, log_p = Rules(suppressed_tokens=[0], end=1, min_tokens=1, stop_tokens=[2]).distributions(LOGITS, [])
    assert log_p.tolist()[:3] == [-math.inf] * 3
    assert log_p[3] == own[3] == LOGITS.log_softmax(-1)[3]


@pytest.mark.parametrize(
    ("size", "written", "banned"),
    [(1, [0, 2], {0, 2}), (2, [0, 1, 0], {1}), (2, [0, 0], {0}), (3, [0, 1, 2, 0, 1], {2}), (3, [0, 1], set()), (2, [], set())],
)
def test_no_ngram_is_written_twice(size: int, written: list[int], banned: set[int]) -> None:
    _, log_p = Rules(no_repeat_ngram=size).distributions(LOGITS, written)
    assert {token for token in range(4) if log_p[token] == -math.inf} == banned


def test_an_ngram_may_come_again_where_nothing_else_is_left() -> None:
    _, log_p = Rules(no_repeat_ngram=1, suppressed_tokens=[3]).distributions(LOGITS, [0, 1, 2])
    assert log_p.tolist() == [*LOGITS.log_softmax(-1).tolist()[:3], -math.inf]


def test_a_prefix_is_not_chosen_but_counts_as_written() -> None:
    rules = Rules(prefix=[1, 0], repetition_penalty=2.0, suppressed_tokens=[1])
    own, log_p = rules.distributions(LOGITS, [])
    assert log_p.tolist() == [-math.inf, own[1], -math.inf, -math.inf]
    assert adjusted([1, 0], prefix=[1, 0], repetition_penalty=2.0) == pytest.approx([1.0, -2.0, 0.5, 0.0])


def letters(tokens: list[int]) -> str:
    return "".join("abcd"[token] for token in tokens)


@pytest.mark.parametrize(
    ("written", "rules", "begin"),
    [
        ([0, 1, 2], {}, 1),
        ([0, 1], {}, None),
        ([1, 2, 1, 2], {"min_tokens": 2}, 2),
        ([1, 2], {"min_tokens": 2}, None),
        ([1, 2, 0], {"prefix": [1, 2]}, None),
        ([1, 2, 2], {"stop_strings": ["bc", "c"], "min_tokens": 2}, 2),
        ([0, 1, 2], {"stop_strings": ["c", "abc"]}, 0),
    ],
)
def test_a_stop_string_counts_where_its_last_token_may_stop(written: list[int], rules: dict, begin: int | None) -> None:
    assert Rules(**{"stop_strings": ["bc"], "decode": letters, **rules}).stop(written) == begin
