"""What a step asks of the model and says of itself, to the number: the model is a list of calls, and moves the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from server.batch.engine import Engine
from server.batch.kv_cache import Rows
from server.batch.sequence_model import Candidates, SequenceShape
from server.batch.step_stats import StepStats
from server.requests import Decoding, Finished, GenerationRequest, Sampling

SHAPE = SequenceShape(layers=1, kv_heads=1, head_width=1, vocab_size=12, longest_target=32, longest_source=32)
START, END = 1, 2


class ListedModel:
    """Notes every call; each takes a second of its clock. Its best token is 5, the next 6, and so on; none ends a text."""

    top_k_choices: tuple[int, ...] = (2, 4, 8)

    def __init__(self, shape: SequenceShape = SHAPE, rows: int = 4) -> None:
        self.shape, self.rows = shape, rows
        self.encoding_overhead = 0.0
        self.calls: list[tuple[object, ...]] = []
        self.now = 100.0

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        self.now += 1.0

    def encode(self, sources: Sequence[Sequence[int]], rows: Sequence[Rows]) -> None:
        self._note("encode", [tuple(source) for source in sources], [own.tolist() for own in rows])

    def prefill(self, tokens: Sequence[int], start: int) -> None:
        self._note("prefill", tuple(tokens), start)

    def adopt(self, rows: Rows, length: int) -> None:
        self.calls.append(("adopt", rows.tolist(), length))

    def decode(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], top_k: int, *, keep_logits: bool = True
    ) -> Candidates:
        self._note("decode", tokens.tolist(), positions.tolist(), top_k, keep_logits)
        ids = np.tile(np.arange(5, 5 + top_k) % 12, (len(tokens), 1))
        return Candidates(ids, np.tile(-0.5 * np.arange(1, top_k + 1, dtype=np.float32), (len(tokens), 1)))

    def logits(self, rows: Rows) -> NDArray[np.float32]:
        logits = np.full((len(rows), 12), -50.0, np.float32)
        logits[:, 5] = 0.0
        return logits

    def branch(self, source: Rows, target: Rows, start: NDArray[np.intp], stop: NDArray[np.intp]) -> None:
        self.calls.append(("branch", source.tolist(), target.tolist(), start.tolist(), stop.tolist()))

    def move(self, source: Rows, target: Rows, length: int) -> None:
        self.calls.append(("move", source.tolist(), target.tolist(), length))

    def said(self) -> list[tuple[object, ...]]:
        """Since the last time."""
        calls, self.calls = self.calls, []
        return calls


PROMPTS = replace(SHAPE, longest_source=0)


def engine_of(model: ListedModel, join_tokens: int = 100) -> Engine:
    return Engine(model, start_token=START, end_token=END, join_tokens=join_tokens, clock=lambda: model.now)


def request(name: str, tokens: int, max_tokens: int = 3, **decoding: object) -> GenerationRequest:
    ids = tuple(range(3, 3 + tokens))
    return GenerationRequest(id=name, input_ids=ids, decoding=Decoding(max_tokens=max_tokens, **decoding))  # type: ignore[arg-type]


def test_a_step_says_what_it_did() -> None:
    model = ListedModel()
    engine = engine_of(model)
    assert not engine.has_work
    engine.submit(request("a", 3, max_tokens=2))
    model.now += 5.0
    engine.submit(request("b", 4, beams=2))
    engine.submit(request("c", 2, beams=4))
    model.now += 2.0
    assert engine.has_work
    events, stats = engine.step()
    assert events == []
    assert stats == StepStats(
        seconds=2.0,
        runtime_seconds=2.0,
        rows=3,
        new_tokens=3,
        joined=("a", "b"),
        encoded_tokens=7,
        live_requests=2,
        live_rows=3,
        row_capacity=4,
        waiting_requests=1,
        waiting_tokens=2,
        queue_seconds=(7.0, 2.0),
        wasted_tokens=0,
    )
    assert model.said()[:2] == [
        ("encode", [(3, 4, 5), (3, 4, 5, 6)], [[0], [1, 2]]),
        ("decode", [START] * 3, [0, 0, 0], 4, False),
    ]
    events, stats = engine.step()
    ((name, event),) = events
    assert isinstance(event, Finished)
    assert (name, event.hypotheses[0].tokens) == ("a", (5, 5))
    assert (stats.seconds, stats.runtime_seconds, stats.rows, stats.joined, stats.encoded_tokens) == (1.0, 1.0, 3, (), 0)
    assert (stats.live_requests, stats.live_rows, stats.waiting_requests, stats.queue_seconds) == (1, 2, 1, ())
    assert [call for call in model.said() if call[0] == "move"] == [("move", [2], [0], 2)], (
        "the last row, as far as it is written"
    )


@pytest.mark.parametrize(("beams", "asked"), [(1, 1), (2, 4), (4, 8), (8, 16)])
def test_a_step_asks_for_no_more_candidates_than_are_needed(beams: int, asked: int) -> None:
    model = ListedModel(rows=8)
    model.top_k_choices = (1, 2, 3, 4, 5, 8, 9, 16, 17)
    engine = engine_of(model)
    engine.submit(request("a", 3, beams=beams))
    engine.step()
    assert [call[3] for call in model.said() if call[0] == "decode"] == [asked]


def test_the_time_outside_the_model_is_the_engines_own() -> None:
    model = ListedModel()
    ticks = iter(range(1000))
    engine = Engine(model, start_token=START, end_token=END, clock=lambda: float(next(ticks)))
    engine.submit(request("a", 3))
    _, stats = engine.step()
    assert stats.runtime_seconds == 2.0, "encode and decode, from one reading of the clock to the next"
    assert stats.seconds == 5.0


def test_a_prompt_is_prefilled_in_chunks_but_for_its_last_token() -> None:
    model = ListedModel(PROMPTS)
    engine = engine_of(model, join_tokens=4)
    engine.submit(request("long", 10, beams=2))
    engine.submit(request("short", 3))
    model.now += 1.0
    seen = []
    for _ in range(3):
        _, stats = engine.step()
        seen.append((stats.encoded_tokens, stats.joined, stats.waiting_requests, stats.live_rows, stats.queue_seconds))
    assert model.said()[:8] == [
        ("prefill", (3, 4, 5, 6), 0),
        ("prefill", (7, 8, 9, 10), 4),
        ("prefill", (11,), 8),
        ("adopt", [0, 1], 9),
        ("prefill", (3, 4), 0),
        ("adopt", [2], 2),
        ("decode", [12, 12, 5], [9, 9, 2], 4, False),
        ("branch", [0], [1], [10], [10]),
    ]
    assert seen == [(4, (), 2, 0, ()), (4, (), 2, 0, ()), (3, ("long", "short"), 0, 3, (3.0, 3.0))]


def test_prompts_of_one_token_join_a_few_at_a_time_too() -> None:
    model = ListedModel(PROMPTS)
    engine = engine_of(model, join_tokens=2)
    for name in "abc":
        engine.submit(request(name, 1))
    _, stats = engine.step()
    assert (stats.joined, stats.encoded_tokens, stats.waiting_requests) == (("a", "b"), 0, 1)
    assert model.said() == [("adopt", [0], 0), ("adopt", [1], 0), ("decode", [3, 3], [0, 0], 2, False)]


def test_a_prompt_that_is_half_read_is_work_and_can_be_cancelled() -> None:
    model = ListedModel(PROMPTS)
    engine = engine_of(model, join_tokens=4)
    engine.submit(request("a", 10))
    _, stats = engine.step()
    assert (stats.waiting_requests, stats.waiting_tokens, stats.rows, stats.new_tokens) == (1, 0, 0, 0)
    assert engine.has_work
    engine.cancel("nobody")
    assert engine.has_work
    engine.cancel("a")
    assert not engine.has_work
    engine.submit(request("b", 2))
    model.said()
    engine.step()
    assert model.said()[:2] == [("prefill", (3,), 0), ("adopt", [0], 1)]


def test_a_cancelled_requests_rows_are_free_at_once_and_its_tokens_counted_once() -> None:
    model = ListedModel()
    engine = engine_of(model)
    engine.submit(request("a", 3, max_tokens=9, beams=3))
    engine.submit(request("b", 3, max_tokens=9))
    engine.submit(request("c", 3, max_tokens=9))
    engine.cancel("c")
    for _ in range(2):
        engine.step()
    model.said()
    engine.cancel("a")
    engine.cancel("a")
    assert model.said() == [("move", [3], [0], 2)]
    _, stats = engine.step()
    assert (stats.wasted_tokens, stats.live_requests, stats.live_rows, stats.new_tokens) == (6, 1, 1, 1)
    assert model.said() == [("decode", [5], [2], 2, False)]
    _, stats = engine.step()
    assert stats.wasted_tokens == 0


@pytest.mark.parametrize(
    ("decoding", "top_k", "keep_logits"),
    [
        pytest.param({}, 2, False, id="one is enough, and two the fewest"),
        pytest.param({"beams": 2}, 4, False, id="exactly what is offered"),
        pytest.param({"beams": 3}, 8, False, id="the next that is offered"),
        pytest.param({"beams": 4, "min_tokens": 1}, 8, False, id="more than is offered"),
        pytest.param({"sampling": Sampling(seed=1)}, 2, True, id="all of them"),
    ],
)
def test_a_step_asks_for_what_its_rows_need(decoding: dict[str, object], top_k: int, keep_logits: bool) -> None:
    model = ListedModel()
    engine = engine_of(model)
    engine.submit(request("a", 3, **decoding))
    engine.step()
    assert model.said()[1][-2:] == (top_k, keep_logits)
