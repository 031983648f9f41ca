"""What a step must know of the live groups at once, and no more: what it brings back of each row costs time on every step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from server.batch.groups import MAX_CANDIDATES, GroupTable
from server.batch.stopping import StoppingText
from server.requests import Adjustments, Decoding, FinishReason, GenerationRequest, Sampling


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


def test_there_may_be_a_group_for_every_row() -> None:
    table = GroupTable(capacity=4, longest=9)
    for _ in range(2):
        groups = [group for name in "abcd" for group in table.add(request(name, Decoding(max_tokens=9)))]
        assert sorted(group.number for group in groups) == [0, 1, 2, 3]
        for group in groups:
            table.remove(group)


def test_what_no_group_asks_for_costs_no_step_anything() -> None:
    table = GroupTable(capacity=16, longest=9)
    assert not table.any_greedy
    assert not table.any_beams
    table.add(request("beams", Decoding(max_tokens=9, beams=4)))
    assert table.any_beams
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
        pytest.param(Decoding(max_tokens=9), True, True, id="streaming"),
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
    assert table.streaming == stream
    table.remove(group)
    assert table.all_plain
    assert not table.streaming


EVERYTHING = Decoding(
    max_tokens=8,
    min_tokens=3,
    hypotheses=2,
    sampling=Sampling(seed=1, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1),
    adjustments=Adjustments(presence_penalty=1.0),
    stop_tokens=(8, 9),
    stop_strings=("x",),
)


def settings(table: GroupTable, number: int) -> dict[str, object]:
    """What stands under a group's number; of tokens, those in use."""
    names = (
        "is_beam is_sampled streams forced_only is_adjusted is_followed has_phrases alternative min_tokens max_tokens "
        "candidates forced_length"
    )
    found: dict[str, object] = {name: getattr(table, name)[number].item() for name in names.split()}
    found["stop_tokens"] = table.stop_tokens[number][table.stop_tokens[number] >= 0].tolist()
    found["forced"] = table.forced[number, : table.forced_length[number]].tolist()
    if table.is_sampled[number]:
        sampled = ("temperature", "top_k", "top_p", "min_p", "needs_all_logits")
        found |= {name: getattr(table, name)[number].item() for name in sampled}
    return found


def test_under_a_groups_number_stands_what_it_asked_for_and_nothing_of_the_one_before() -> None:
    table = GroupTable(capacity=1, longest=9)
    plain = {
        "is_beam": False,
        "is_sampled": False,
        "streams": False,
        "forced_only": False,
        "is_adjusted": False,
        "is_followed": False,
        "has_phrases": False,
        "alternative": -1,
        "min_tokens": 0,
        "max_tokens": 9,
        "candidates": 1,
        "forced_length": 0,
        "stop_tokens": [],
        "forced": [],
    }
    everything = plain | {
        "is_sampled": True,
        "streams": True,
        "forced_only": True,
        "is_adjusted": True,
        "is_followed": True,
        "min_tokens": 3,
        "max_tokens": 8,
        "candidates": 8,
        "forced_length": 2,
        "stop_tokens": [8, 9],
        "forced": [5, 6],
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "needs_all_logits": False,
    }
    sampled = {"is_sampled": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "needs_all_logits": True}
    searched = {"is_beam": True, "is_followed": True, "is_adjusted": True, "has_phrases": True, "candidates": 4}
    whole = replace(request("a", EVERYTHING), stream=True, forced=(5, 6), forced_only=True)
    for asked, expected in [
        (request("a", Decoding(max_tokens=9)), plain),
        (whole, everything),
        (request("a", Decoding(max_tokens=9)), plain),
        (request("a", Decoding(max_tokens=9, sampling=Sampling(seed=1))), plain | sampled),
        (
            request("a", Decoding(max_tokens=9, sampling=Sampling(seed=1, top_k=1))),
            plain | sampled | {"top_k": 1, "needs_all_logits": False},
        ),
        (whole, everything),
        (request("a", Decoding(max_tokens=9, beams=2, required_phrases=((5,),))), plain | searched),
        (request("a", Decoding(max_tokens=9, alternatives=1)), plain | {"alternative": 0}),
        (request("a", Decoding(max_tokens=9)), plain),
    ]:
        (group,) = table.add(asked)
        assert settings(table, group.number) == expected
        assert (group.phrases is not None) is expected["has_phrases"]
        table.remove(group)


@pytest.mark.parametrize(
    ("decoding", "counter"),
    [
        pytest.param(Decoding(max_tokens=9, adjustments=Adjustments(presence_penalty=1.0)), "adjusted", id="penalties"),
        pytest.param(Decoding(max_tokens=9, min_tokens=1, stop_tokens=(7,)), "adjusted", id="forbidden stop tokens"),
        pytest.param(Decoding(max_tokens=9, alternatives=1), "with_alternatives", id="alternatives"),
        pytest.param(Decoding(max_tokens=9, stop_tokens=(7,)), "with_stop_tokens", id="stop tokens"),
        pytest.param(Decoding(max_tokens=9, beams=2, required_phrases=((5,),)), "with_phrases", id="phrases"),
        pytest.param(Decoding(max_tokens=9, stop_strings=("x",)), "followed", id="stop strings"),
        pytest.param(Decoding(max_tokens=9, beams=2, required_phrases=((5,),)), "followed", id="phrases are followed"),
    ],
)
def test_it_is_counted_how_many_groups_ask_for_something(decoding: Decoding, counter: str) -> None:
    table = GroupTable(capacity=4, longest=9)
    table.add(request("plain", Decoding(max_tokens=9)))
    counts, groups = [getattr(table, counter)], []
    for name in ("a", "b"):
        groups += table.add(request(name, decoding))
        counts.append(getattr(table, counter))
    for group in groups:
        table.remove(group)
        counts.append(getattr(table, counter))
    assert counts == [0, 1, 2, 1, 0]


def test_beam_searches_are_listed_in_order_of_arrival_and_their_rows_by_member() -> None:
    table = GroupTable(capacity=8, longest=9)
    assert table.all_beams.numbers.tolist() == []
    (first,) = table.add(request("first", Decoding(max_tokens=9, beams=3)))
    table.add(request("greedy", Decoding(max_tokens=9)))
    (second,) = table.add(request("second", Decoding(max_tokens=9, beams=2)))
    assert table.all_beams.numbers.tolist() == [first.number, second.number]
    table.place(first, np.array([4, 1, 2]))
    table.place(second, np.array([0, 3]))
    assert table.rows[first.number].tolist() == [4, 1, 2, -1, -1, -1, -1, -1]
    assert table.all_beams.rows.tolist() == [[4, 1, 2], [0, 3, -1]]
    assert not table.all_beams.complete
    assert table.beams(np.array([second.number])).complete
    table.move(np.array([first.number, second.number]), np.array([2, 0]), np.array([6, 2]))
    assert table.all_beams.rows.tolist() == [[4, 1, 6], [2, 3, -1]], "rows that moved are looked up anew"
    table.place(first, np.array([5]))
    assert table.rows[first.number].tolist() == [5, *[-1] * 7]
    table.remove(first)
    assert table.all_beams.numbers.tolist() == [second.number]
    assert table.all_beams.rows.tolist() == [[2, 3]]


def test_a_request_lives_as_long_as_one_of_its_alternatives() -> None:
    table = GroupTable(capacity=4, longest=9)
    groups = table.add(request("a", Decoding(max_tokens=9, beams=2, alternatives=3)))
    assert [(group.alternative, group.live_rows) for group in groups] == [(0, 2), (1, 2), (2, 2)]
    assert [table.alternative[group.number] for group in groups] == [0, 1, 2]
    for left in (2, 1):
        table.remove(groups.pop())
        assert len(table) == 1
        assert len(list(table)) == left
        assert table.of_request("a") is not None
    table.remove(groups.pop())
    assert (len(table), table.of_request("a")) == (0, None)


def test_enough_hypotheses_are_as_many_as_beams_times_patience() -> None:
    for beams, patience, enough in [(4, 1.0, 4), (4, 0.5, 2), (4, 2.0, 8), (2, 0.1, 1)]:
        (group,) = GroupTable(capacity=8, longest=9).add(request("a", Decoding(max_tokens=9, beams=beams, patience=patience)))
        for number in range(enough):
            assert not group.enough
            group.finished[number] = group.hypothesis((5, 2), (-1.0, -0.5), FinishReason.END_OF_TEXT)
        assert group.enough


class Plain:
    """Writes nothing."""

    def push(self, ids: Iterable[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def copy(self) -> Plain:
        return self


def test_an_output_ends_for_one_reason() -> None:
    (group,) = GroupTable(capacity=8, longest=9).add(request("a", Decoding(max_tokens=9, stop_tokens=(7,))))
    reasons = [group.finish_reason(0, token, end_token=2) for token in (2, 7, 5)]
    assert reasons == [FinishReason.END_OF_TEXT, FinishReason.STOP, FinishReason.LENGTH]
    group.texts = [StoppingText(Plain(), ("x",), quiet=0) for _ in range(2)]
    group.texts[0].stopped = True
    assert [group.finish_reason(member, 5, end_token=2) for member in (0, 1)] == [FinishReason.STOP, FinishReason.LENGTH]


def test_a_score_is_the_sum_by_which_tokens_were_chosen_over_a_power_of_the_length() -> None:
    (group,) = GroupTable(capacity=8, longest=9).add(request("a", Decoding(max_tokens=9, beams=2, length_penalty=2.0)))
    plain = group.hypothesis((5, 6, 2), (-1.0, -0.5, -3.0), FinishReason.END_OF_TEXT)
    assert (plain.log_probability, plain.score) == (-4.5, -0.5)
    adjusted = group.hypothesis((5, 6, 2), (-1.0, -0.5, -3.0), FinishReason.END_OF_TEXT, adjusted=-9.0)
    assert (adjusted.log_probability, adjusted.score) == (-4.5, -1.0)


def test_results_are_the_best_first_under_beam_search_and_in_order_of_the_samples_otherwise() -> None:
    scores = {1: -3.0, 0: -2.0, 2: -1.0}
    found = {}
    for name, decoding in [
        ("beams", Decoding(max_tokens=9, beams=3, hypotheses=2)),
        ("samples", Decoding(max_tokens=9, hypotheses=3, sampling=Sampling(seed=1))),
    ]:
        (group,) = GroupTable(capacity=8, longest=9).add(request("a", decoding))
        for number, score in scores.items():
            group.finished[number] = group.hypothesis((5,), (score,), FinishReason.LENGTH)
        found[name] = [hypothesis.score for hypothesis in group.results()]
    assert found == {"beams": [-1.0, -2.0], "samples": [-2.0, -3.0, -1.0]}
