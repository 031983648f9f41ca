"""What a step must know of the live groups at once, and no more: what it brings back of each row costs time on every step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.batch.groups import MAX_CANDIDATES, GroupTable
from server.requests import Decoding, GenerationRequest, Sampling


def request(name: str, decoding: Decoding) -> GenerationRequest:
    return GenerationRequest(id=name, input_ids=(5,), decoding=decoding)


@pytest.mark.parametrize(
    ("decoding", "candidates"),
    [
        pytest.param(Decoding(max_tokens=9), 1, id="greedy"),
        pytest.param(Decoding(max_tokens=9, min_tokens=3), 2, id="one more where the end of text is forbidden"),
        pytest.param(Decoding(max_tokens=9, beams=5), 10, id="beams: two each"),
        pytest.param(Decoding(max_tokens=9, beams=5, min_tokens=3), 11, id="beams that may not end"),
        pytest.param(Decoding(max_tokens=9, sampling=Sampling(seed=1, top_k=7)), 7, id="top-k sampling"),
        pytest.param(Decoding(max_tokens=9, sampling=Sampling(seed=1)), 1, id="sampling from all logits"),
        pytest.param(Decoding(max_tokens=9, sampling=Sampling(seed=1, top_k=MAX_CANDIDATES)), 1, id="top-k from all logits"),
        pytest.param(Decoding(max_tokens=9, alternatives=3), 3, id="alternatives"),
    ],
)
def test_a_step_brings_back_as_many_candidates_as_are_needed(decoding: Decoding, candidates: int) -> None:
    table = GroupTable(capacity=16, longest=9)
    for group in table.add(request("a", decoding)):
        assert table.candidates[group.number] == candidates
    assert table.most_candidates == candidates


def test_the_widest_group_decides_as_long_as_it_lives() -> None:
    table = GroupTable(capacity=16, longest=9)
    table.add(request("narrow", Decoding(max_tokens=9)))
    (wide,) = table.add(request("wide", Decoding(max_tokens=9, beams=4)))
    assert table.most_candidates == 8
    table.remove(wide)
    assert table.most_candidates == 1


def test_what_no_group_asks_for_costs_no_step_anything() -> None:
    table = GroupTable(capacity=16, longest=9)
    assert not table.any_greedy
    table.add(request("beams", Decoding(max_tokens=9, beams=4)))
    assert not table.any_greedy
    assert not table.any_min_tokens
    (greedy,) = table.add(request("greedy", Decoding(max_tokens=9)))
    assert table.any_greedy
    table.remove(greedy)
    assert not table.any_greedy
    table.add(request("long", Decoding(max_tokens=9, min_tokens=1)))
    assert table.any_min_tokens


@pytest.mark.parametrize(
    ("decoding", "stream", "plain"),
    [
        pytest.param(Decoding(max_tokens=9), False, True, id="greedy"),
        pytest.param(Decoding(max_tokens=9, beams=4, min_tokens=2), False, True, id="beams"),
        pytest.param(Decoding(max_tokens=9), True, False, id="streaming"),
        pytest.param(Decoding(max_tokens=9, sampling=Sampling(seed=1)), False, False, id="sampling"),
        pytest.param(Decoding(max_tokens=9, stop_tokens=(7,)), False, False, id="stop tokens"),
        pytest.param(Decoding(max_tokens=9, stop_strings=("x",)), False, False, id="stop strings"),
    ],
)
def test_the_short_cut_is_for_groups_without_anything_to_look_after(decoding: Decoding, stream: bool, plain: bool) -> None:
    table = GroupTable(capacity=16, longest=9)
    assert table.all_plain
    (group,) = table.add(replace(request("a", decoding), stream=stream))
    assert table.all_plain is plain
    table.remove(group)
    assert table.all_plain
