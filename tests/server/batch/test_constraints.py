"""Required phrases: what is still needed, against a look at the whole output; and how banks share a beam."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.decoding_rules import Rules
from server.batch.constraints import RequiredPhrases, order_by_banks

TOKENS = st.integers(0, 3)  # few, so that phrases overlap themselves and each other
PHRASES = st.lists(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=4, unique=True)


@given(PHRASES, st.lists(TOKENS | st.just(9), max_size=30))
def test_each_member_is_where_its_output_says(phrases: list[tuple[int, ...]], written: list[int]) -> None:
    rules, tracked = Rules(required_phrases=phrases), RequiredPhrases(phrases, members=2)
    assert tracked.total == sum(map(len, phrases))
    for n in range(len(written) + 1):
        output = written[:n]
        assert tracked.need(0) == rules.need(output)
        assert tracked.advancing(0) == rules.advancing(output)
        wanted = [rules.need([*output, token]) for token in (0, 1, 2, 3, 9)]
        assert tracked.needs_after(0, [0, 1, 2, 3, 9]) == wanted
        if tracked.need(0):  # so that a search can always keep its promise
            assert min(wanted[token] for token in tracked.advancing(0)) < tracked.need(0)
        if n < len(written):
            tracked.write(0, written[n])
    assert tracked.need(1) == tracked.total


@given(PHRASES, st.lists(TOKENS, min_size=2, max_size=12))
def test_children_take_over_from_parents_as_they_were(phrases: list[tuple[int, ...]], written: list[int]) -> None:
    tracked, rules = RequiredPhrases(phrases, members=2), Rules(required_phrases=phrases)
    outputs: list[list[int]] = [[], []]
    for first, second in zip(written[::2], written[1::2], strict=False):
        tracked.branch([1, 0], [0, 1])  # each becomes the other's child
        tracked.write(0, first)
        tracked.write(1, second)
        outputs = [[*outputs[1], first], [*outputs[0], second]]
        assert [tracked.need(0), tracked.need(1)] == [rules.need(output) for output in outputs]


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.lists(st.tuples(st.sampled_from([-np.inf, -3.0, -2.5, -1.0, -0.5]), st.integers(0, 3)), min_size=n, max_size=n),
            min_size=1,
            max_size=4,
        )
    )
)
def test_banks_take_turns(groups: list) -> None:
    scores = np.array([[score for score, _ in group] for group in groups], np.float32)
    banks = np.array([[bank for _, bank in group] for group in groups])
    for order, group in zip(order_by_banks(scores, banks).tolist(), groups, strict=True):
        place = {}
        for bank in range(4):
            members = [i for i, (score, own) in enumerate(group) if own == bank and score > -np.inf]
            for rank, i in enumerate(sorted(members, key=lambda i: -group[i][0])):
                place[i] = (rank, -bank)
        assert sorted(order) == list(range(len(group)))
        assert order[: len(place)] == sorted(place, key=place.__getitem__)
