"""The row table: live rows are always the prefix, and every row's content survives the moves."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batch.kv_cache import RowTable

CAPACITY = 9


@given(st.data())
def test_contents_follow_their_owners_through_joins_and_leaves(data: st.DataObject) -> None:
    table, memory = RowTable(CAPACITY), [""] * CAPACITY  # memory stands for the caches: who wrote a row last
    owned: dict[str, int] = {}  # row of each owner
    names = (f"owner {i}" for i in range(1000))
    for _ in range(data.draw(st.integers(1, 12), label="steps")):
        if data.draw(st.booleans(), label="join"):
            count = data.draw(st.integers(0, table.free), label="count")
            rows = table.join(count).tolist()
            assert not set(rows) & set(owned.values())
            for row in rows:
                owner = next(names)
                memory[row], owned[owner] = owner, row
        else:
            leaving = data.draw(st.lists(st.sampled_from(sorted(owned)), unique=True) if owned else st.just([]), label="leave")
            moves = table.leave(np.array([owned.pop(owner) for owner in leaving], np.intp))
            pairs = list(zip(moves.source.tolist(), moves.target.tolist(), strict=True))
            assert not set(moves.source.tolist()) & set(moves.target.tolist())
            assert len(pairs) <= len(leaving)  # no more copies than there are gaps
            random.Random(0).shuffle(pairs)  # the order does not matter
            for source, target in pairs:
                memory[target] = memory[source]
            moved = dict(pairs)
            owned = {owner: moved.get(row, row) for owner, row in owned.items()}
        assert sorted(owned.values()) == list(range(table.live))
        assert table.free == CAPACITY - len(owned)
        assert all(memory[row] == owner for owner, row in owned.items())


def test_joining_rows_are_the_next_ones() -> None:
    table = RowTable(5)
    assert table.join(2).tolist() == [0, 1]
    assert table.join(3).tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="1 rows asked for, 0 free"):
        table.join(1)
    assert table.live == 5


def test_the_last_rows_close_the_gaps() -> None:
    table = RowTable(6)
    table.join(6)
    moves = table.leave(np.array([1, 4, 0]))
    assert sorted(zip(moves.source.tolist(), moves.target.tolist(), strict=True)) == [(3, 0), (5, 1)]
    assert table.live == 3
    assert table.leave(np.array([2])).source.size == 0  # the last one leaves no gap
