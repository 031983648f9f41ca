"""Choosing tokens for all rows at once, against the same thing done for one row in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batch.sampling import draw, forbid, most_probable, nth_possible, uniform_draws
from server.requests import Sampling

ALMOST_ONE = math.nextafter(1.0, 0.0)


def plain_draw(log_p: list[float], uniform: float, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The columns that a draw may give: more than one where rounding decides."""
    columns = [i for i, value in enumerate(log_p) if value > -math.inf][: top_k or None]
    weights = [math.exp((log_p[i] - log_p[columns[0]]) / temperature) for i in columns]
    whole, nucleus, mass = math.fsum(weights), [], 0.0
    for column, weight in zip(columns, weights, strict=True):
        nucleus.append((column, weight / whole))
        mass += weight / whole
        if mass >= top_p:
            break
    while nucleus[-1][1] < min_p * nucleus[0][1]:
        mass -= nucleus.pop()[1]
    answers, begin = [], 0.0
    for column, p in nucleus:
        if begin / mass - 1e-9 <= uniform < (begin + p) / mass + 1e-9:
            answers.append(column)
        begin += p
    # Where a sum comes within rounding of top_p, the nucleus may be one wider or narrower.
    return answers or [nucleus[-1][0]]


def one_row(
    log_p: list[float], uniform: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> int:
    settings = (np.array([value]) for value in (uniform, temperature, top_k, top_p, min_p))
    column = draw(np.array([log_p], np.float32), *settings)
    return int(column[0])


rows = st.integers(2, 10).flatmap(
    lambda width: st.lists(
        st.tuples(
            st.lists(st.floats(-12, 0, width=32), min_size=width, max_size=width).map(lambda row: sorted(row, reverse=True)),
            st.none() | st.integers(0, width - 1),  # a forbidden candidate
            st.floats(0, 1, exclude_max=True),
            st.sampled_from([0.01, 0.3, 1.0, 2.5, 100.0]),
            st.sampled_from([0, 1, 2, 5, 50, 2**31 - 1]),
            st.sampled_from([1e-9, 0.013, 0.313, 0.777, 0.999, 1.0]),
            st.sampled_from([0.0, 0.0, 1e-4, 0.0501, 0.4999, 1.0]),
        ),
        min_size=1,
        max_size=6,
    )
)


@given(rows)
def test_every_row_is_drawn_as_if_alone(batch: list) -> None:
    log_p = np.array([row for row, *_ in batch], np.float32)
    for i, (_, forbidden, *_) in enumerate(batch):
        if forbidden is not None:
            log_p[i, forbidden] = -np.inf
    uniform, temperature, top_k, top_p, min_p = (np.array(column) for column in list(zip(*batch, strict=True))[2:])
    together = draw(log_p, uniform, temperature, top_k, top_p, min_p).tolist()
    for i, column in enumerate(together):
        options = (float(uniform[i]), float(temperature[i]), int(top_k[i]), float(top_p[i]), float(min_p[i]))
        assert column == one_row(log_p[i].tolist(), *options)
        assert column in plain_draw(log_p[i].tolist(), *options)


FALLING = np.log([0.4, 0.3, 0.2, 0.1]).tolist()


def test_forbidden_candidates_are_not_counted() -> None:
    log_p = np.array([[-1.0, -np.inf, -2.0, -3.0]] * 3, np.float32)
    assert nth_possible(log_p, np.array([0, 1, 2])).tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("uniform", "column"),
    [(0.0, 0), (0.399, 0), (0.401, 1), (0.699, 1), (0.701, 2), (0.899, 2), (0.901, 3), (ALMOST_ONE, 3)],
)
def test_candidates_are_laid_out_by_their_probability(uniform: float, column: int) -> None:
    assert one_row(FALLING, uniform) == column


def test_edges() -> None:
    assert one_row(FALLING, ALMOST_ONE, top_k=2) == 1
    assert one_row(FALLING, ALMOST_ONE, top_k=99) == 3
    assert one_row(FALLING, ALMOST_ONE, top_p=1e-12) == 0
    assert one_row(FALLING, ALMOST_ONE, top_p=0.4) in (0, 1)
    assert one_row(FALLING, ALMOST_ONE, top_p=0.41) == 1  # the one that reaches it is in
    assert one_row(FALLING, ALMOST_ONE, min_p=0.74) == 1
    assert one_row(FALLING, ALMOST_ONE, min_p=0.76) == 0
    assert one_row(FALLING, ALMOST_ONE, min_p=0.26, top_p=0.65) == 1
    assert one_row(FALLING, 0.999, temperature=0.01) == 0
    assert one_row(FALLING, 0.51, temperature=1000.0) == 2  # nearly even
    assert one_row([-80.0, -90.0, -200.0], 0.5) == 0  # far down, but the best there is


@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
def test_a_forbidden_candidate_is_never_drawn_and_takes_no_place(uniform: float) -> None:
    for forbidden in range(4):
        log_p = list(FALLING)
        log_p[forbidden] = -math.inf
        for top_k in (0, 1, 2, 3, 4):
            column = one_row(log_p, uniform, top_k=top_k)
            assert column != forbidden
            possible = [i for i in range(4) if i != forbidden][: top_k or None]
            assert column == (possible[0] if uniform == 0.0 else possible[-1] if uniform == ALMOST_ONE else column)
            assert column in possible


@given(st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=40), st.floats(0, 1, exclude_max=True))
def test_rounding_never_leads_to_a_forbidden_candidate(values: list[float], uniform: float) -> None:
    log_p = [*sorted(values, reverse=True), -math.inf, -math.inf]
    for number in (0.0, uniform, ALMOST_ONE):
        assert one_row(log_p, number) < len(values)


def test_forbidding_touches_one_token_of_the_given_rows() -> None:
    ids = np.array([[7, 2, 5], [2, 7, 5], [5, 7, 4]])
    log_p = np.array([[-1, -2, -3], [-1, -2, -3], [-1, -2, -3]], np.float32)
    found = forbid(ids, log_p, 2, np.array([True, False, True]))
    assert found.tolist() == [[-1, -math.inf, -3], [-1, -2, -3], [-1, -2, -3]]
    assert found.dtype == np.float32
    assert log_p[0, 1] == -2  # what the caller has stays as it is


def test_the_first_of_equals_is_the_most_probable() -> None:
    log_p = np.array([[-1, -1, -2], [-np.inf, -3, -3], [-1, -5, -9]], np.float32)
    assert most_probable(np.zeros((3, 3), np.int64), log_p).tolist() == [0, 1, 0]


def test_draws_depend_on_seed_and_sample_alone() -> None:
    draws = uniform_draws(Sampling(seed=5), 1, 20)
    assert draws[:7].tolist() == uniform_draws(Sampling(seed=5), 1, 7).tolist()
    assert ((draws >= 0) & (draws < 1)).all()
    others = [(5, 0), (6, 1), (2**64 - 1, 1)]
    assert len({tuple(uniform_draws(Sampling(seed=seed), sample, 20)) for seed, sample in [(5, 1), *others]}) == 4
    reference = np.random.Generator(np.random.Philox(key=np.array([5, 1], np.uint64)))
    assert draws.tolist() == [reference.random() for _ in range(20)]  # as the reference decoder draws: one a step
