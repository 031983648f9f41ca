"""A beam step of all groups at once, against the same step of one group in plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batch.beam import Beams, BeamStep, agreed_length, beam_step

END = 2


@dataclass
class PlainGroup:
    """One beam search: its rows, and for each row the total so far and the candidates (token, log-probability)."""

    rows: list[int]
    totals: list[float]
    candidates: list[list[tuple[int, float]]]

    @property
    def width(self) -> int:
        return len(self.rows)

    def step(self) -> tuple[list[tuple[int, int, float]], list[tuple[int, float]]]:
        """Survivors (row continued, token, log-probability) and ended ones (row continued, log-probability), best first."""
        ranked = sorted(
            (
                (-(np.float32(total) + np.float32(log_p)), row, token, log_p)
                for row, total, own in zip(self.rows, self.totals, self.candidates, strict=True)
                for token, log_p in own
                if total > -math.inf and log_p > -math.inf
            ),
        )[: 2 * self.width]
        ended = [(row, log_p) for _, row, token, log_p in ranked[: self.width] if token == END]
        survivors = [(row, token, log_p) for _, row, token, log_p in ranked if token != END][: self.width]
        return survivors, ended


def random_group(rng: random.Random, rows: list[int], count: int) -> PlainGroup:
    def one(value: float) -> float:
        return float(np.float32(value))

    totals = [one(rng.uniform(-9, 0)) for _ in rows]
    kind = rng.choice(["all", "all", "first", "some", "none"])
    if kind != "all":
        totals = [t if (kind == "some" and rng.random() < 0.5) or (kind == "first" and i == 0) else -math.inf
                  for i, t in enumerate(totals)]  # fmt: skip
    candidates = []
    for _ in rows:
        tokens = rng.sample([t for t in range(60) if t != END], count)
        if rng.random() < 0.6:
            tokens[rng.randrange(count)] = END
        falling = sorted((one(rng.uniform(-6, 0)) for _ in tokens), reverse=True)
        forbidden = rng.random() < 0.3
        pairs = zip(tokens, falling, strict=True)
        candidates.append([(t, -math.inf if t == END and forbidden else p) for t, p in pairs])
    return PlainGroup(rows, totals, candidates)


def run(groups: list[PlainGroup]) -> BeamStep:
    width, count = max(g.width for g in groups), len(groups[0].candidates[0])
    table = np.full((len(groups), width), -1)
    totals = np.full((len(groups), width), np.float32(0.0))  # what lies in unused places must not matter
    ids = np.full((len(groups), width, count), 50)
    log_p = np.zeros((len(groups), width, count), np.float32)
    for i, group in enumerate(groups):
        n = group.width
        table[i, :n], totals[i, :n] = group.rows, group.totals
        ids[i, :n] = [[token for token, _ in own] for own in group.candidates]
        log_p[i, :n] = [[p for _, p in own] for own in group.candidates]
    return beam_step(Beams.of(np.arange(len(groups)), table), totals, ids, log_p, END)


def check(groups: list[PlainGroup], step: BeamStep) -> None:
    sources, targets = step.survivor_source.tolist(), step.survivor_target.tolist()
    found = list(zip(sources, step.survivor_token.tolist(), step.survivor_log_probability.tolist(), strict=True))
    ended = list(zip(step.ended_source.tolist(), step.ended_log_probability.tolist(), strict=True))
    plain = [group.step() for group in groups]
    assert found == [survivor for survivors, _ in plain for survivor in survivors]
    assert ended == [one for _, ends in plain for one in ends]

    assert len(set(targets)) == len(targets)
    own = {row: i for i, group in enumerate(groups) for row in group.rows}
    moved = [(s, t) for s, t in zip(sources, targets, strict=True) if s != t]
    assert all(own[s] == own[t] for s, t in moved)
    assert not {t for _, t in moved} & set(sources)  # whoever is copied from stays as it is
    assert set(sources) <= set(targets)  # every parent with children keeps one of them in its own row
    assert len(moved) == len(sources) - len(set(sources))  # so no more copies than needed
    assert sorted([*step.empty.tolist(), *targets]) == sorted(own)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 2**32))
def test_each_group_steps_as_if_alone(widths: list[int], spare: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = rng.sample(range(64), sum(widths))
    groups = []
    for width in widths:
        own, rows = rows[:width], rows[width:]
        groups.append(random_group(rng, own, 2 * max(widths) + spare))
    together = run(groups)
    check(groups, together)
    for group in groups:
        check([group], run([group]))


def group(*totals: float, candidates: list[list[tuple[int, float]]]) -> PlainGroup:
    filled = [[*own, *((40 + i, -30.0 - i) for i in range(2 * len(totals) - len(own)))] for own in candidates]
    return PlainGroup(list(range(10, 10 + len(totals))), list(totals), filled)


def test_an_end_of_rank_width_or_worse_is_dropped() -> None:
    step = run([group(0.0, -9.0, candidates=[[(5, -0.1), (6, -0.2), (END, -0.3), (7, -0.4)], []])])
    assert step.survivor_token.tolist() == [5, 6]
    assert step.ended_source.size == 0
    step = run([group(0.0, -9.0, candidates=[[(5, -0.1), (END, -0.2), (6, -0.3), (7, -0.4)], []])])
    assert step.survivor_token.tolist() == [5, 6]
    assert step.ended_source.tolist() == [10]
    assert step.ended_log_probability.tolist() == [pytest.approx(-0.2)]


def test_one_parent_may_take_all_places() -> None:
    step = run([group(0.0, -9.0, -9.0, candidates=[[(5, -0.1), (6, -0.2), (7, -0.3)], [], []])])
    assert step.survivor_source.tolist() == [10, 10, 10]
    assert step.survivor_target.tolist() == [10, 11, 12]


def test_parents_that_swap_ranks_stay_in_their_rows() -> None:
    step = run([group(-1.0, -0.1, candidates=[[(5, -0.1)], [(6, -0.1)]])])
    assert list(zip(step.survivor_source, step.survivor_target, step.survivor_token, strict=True)) == [(11, 11, 6), (10, 10, 5)]


def test_a_group_with_no_continuation_is_empty() -> None:
    step = run([group(-math.inf, -math.inf, candidates=[[(5, -0.1)], [(6, -0.1)]])])
    assert step.survivor_source.size == step.ended_source.size == 0
    assert step.empty.tolist() == [10, 11]


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 6))
def test_agreement_is_the_longest_common_prefix(rows: list[list[int]], known: int) -> None:
    rows = [[9] * known + row[known:] for row in rows]  # known to agree
    wanted = next((i for i in range(6) if len({row[i] for row in rows}) > 1), 6)
    assert agreed_length(np.array(rows, np.int32), known) == wanted
