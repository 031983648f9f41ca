"""Adjusted distributions of all rows at once, against the reference decoder's rules for one hypothesis."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.decoding_rules import Rules
from server.batch.adjusted import best_tokens
from server.batch.penalties import AdjustmentTable
from server.requests import Adjustments

V = 7
TOKENS = st.integers(0, V - 1)


@st.composite
def requests(draw) -> Adjustments:
    return Adjustments(
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -1.0, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -1.0, 0.7])),
        token_bias=tuple(draw(st.dictionaries(TOKENS, st.sampled_from([-3.0, 2.5]), max_size=2)).items()),
        no_repeat_ngram=draw(st.sampled_from([0, 1, 2, 3, 9])),
        suppressed_tokens=tuple(draw(st.sets(TOKENS, max_size=V - 1))),
    )


ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(TOKENS, max_size=12), st.lists(st.floats(-9, 9, width=32), min_size=V, max_size=V)),
    min_size=1,
    max_size=6,
)


@given(st.lists(requests(), min_size=3, max_size=3), ROWS)
def test_every_row_is_adjusted_as_if_alone(asked: list[Adjustments], rows: list) -> None:
    table = AdjustmentTable(8)
    for number in (0, 1, 2):  # a request that is gone leaves nothing to the next one of its number
        table.add(number, Adjustments(token_bias=((0, 9.0),), suppressed_tokens=(1,), repetition_penalty=9.0))
        table.remove(number)
    for number, adjustments in enumerate(asked):
        table.add(number, adjustments)
    group = np.array([number for number, *_ in rows], np.int32)
    length = np.array([len(written) for _, written, _ in rows], np.int32)
    tokens = np.full((len(rows), int(length.max())), 5, np.int32)  # what lies behind a row's end must not matter
    for row, (_, written, _) in enumerate(rows):
        tokens[row, : len(written)] = written
    logits = np.array([values for *_, values in rows], np.float32)
    shift = -np.log(np.exp(logits).sum(axis=1))
    adjusted = table.reweigh(logits, shift, group, tokens, length)
    table.suppress(adjusted, group)
    table.forbid_repeats(adjusted, group, tokens, length)
    for found, (number, written, values) in zip(adjusted, rows, strict=True):
        a = asked[number]
        rules = Rules(
            repetition_penalty=a.repetition_penalty,
            frequency_penalty=a.frequency_penalty,
            presence_penalty=a.presence_penalty,
            token_bias=dict(a.token_bias),
            no_repeat_ngram=a.no_repeat_ngram,
            suppressed_tokens=a.suppressed_tokens,
        )
        _, wanted = rules.distributions(torch.tensor(values), written)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
        assert np.isfinite(found).any()


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_best_tokens_are_those_of_a_sort(vocab_size: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_p = -rng.integers(0, 30, (3, vocab_size)).astype(np.float32)  # with many equals
    log_p[rng.random(log_p.shape) < 0.2] = -np.inf
    width = min(width, vocab_size)
    wanted = np.argsort(-log_p, axis=1, kind="stable")[:, :width]
    assert (best_tokens(log_p, width) == wanted).all()
