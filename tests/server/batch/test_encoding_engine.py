"""Encoding in batches: within the limits, first come first served, and every answer as if its input were alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.batch.encoding_engine import EncodingEngine
from server.device.encoding_runtime import EncodingRuntime
from server.device.session import SessionSettings
from server.requests import Encoded, EncodingRequest, Failed, Failure
from tests import tiny


class Lengths:
    """A model whose vector is the input's length and sum; it remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def encode(self, sources: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.batches.append([len(source) for source in sources])
        vectors = np.array([[len(source), sum(source)] for source in sources], np.float32)
        return np.zeros((len(sources), 0), np.float32), vectors


def request(name: str, length: int) -> EncodingRequest:
    return EncodingRequest(id=name, input_ids=tuple(range(1, length + 1)))


def drain(engine: EncodingEngine) -> dict[str, object]:
    answers: dict[str, object] = {}
    while engine.has_work:
        events, _ = engine.step()
        assert events
        answers |= dict(events)
    return answers


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 60))
def test_batches_stay_within_the_limits_and_in_order(lengths: list[int], batch_rows: int, batch_tokens: int) -> None:
    model = Lengths()
    engine = EncodingEngine(model, batch_rows=batch_rows, batch_tokens=batch_tokens)
    for i, length in enumerate(lengths):
        engine.submit(request(f"r{i}", length))
    answers = drain(engine)
    assert [length for batch in model.batches for length in batch] == lengths
    for batch, following in zip(model.batches, [*model.batches[1:], None], strict=True):
        assert len(batch) <= batch_rows
        assert len(batch) == 1 or max(batch) * len(batch) <= batch_tokens  # padding counts
        if following:  # the next one did not fit any more
            longer = [*batch, following[0]]
            assert len(longer) > batch_rows or max(longer) * len(longer) > batch_tokens
    wanted = {f"r{i}": Encoded((), (float(n), n * (n + 1) / 2)) for i, n in enumerate(lengths)}
    assert answers == wanted


def test_a_withdrawn_request_is_not_encoded() -> None:
    model = Lengths()
    engine = EncodingEngine(model, batch_rows=4)
    for i in range(3):
        engine.submit(request(f"r{i}", i + 1))
    engine.cancel("r1")
    engine.cancel("never heard of")
    assert list(drain(engine)) == ["r0", "r2"]
    assert model.batches == [[1, 3]]
    engine.submit(request("r9", 2))
    engine.cancel("r9")
    assert not engine.has_work


def test_a_step_tells_what_it_did() -> None:
    times = iter([0.0, 1.0, 10.0, 10.5, 12.5, 13.0])
    engine = EncodingEngine(Lengths(), batch_rows=1, clock=lambda: next(times))
    engine.submit(request("a", 4))
    engine.submit(request("b", 7))
    _, stats = engine.step()
    assert (stats.seconds, stats.runtime_seconds) == (3.0, 2.0)
    assert (stats.joined, stats.encoded_tokens) == (("a",), 4)
    assert (stats.waiting_requests, stats.waiting_tokens) == (1, 7)
    assert stats.queue_seconds == (10.0,)
    assert (stats.rows, stats.new_tokens, stats.live_rows, stats.row_capacity) == (0, 0, 0, 1)


@pytest.mark.parametrize("where", ["vectors", "probabilities"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_fail_their_request_alone(where: str, value: float) -> None:
    class Sick:
        def encode(self, sources: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            parts = {"probabilities": np.full((3, 2), 0.5, np.float32), "vectors": np.zeros((3, 4), np.float32)}
            parts[where][1, 0] = value
            return parts["probabilities"], parts["vectors"]

    engine = EncodingEngine(Sick(), batch_rows=4)
    for i in range(3):
        engine.submit(request(f"r{i}", 2))
    answers = drain(engine)
    assert answers["r1"] == Failed(Failure.NUMERICS, "the model's scores are not finite for this input")
    assert answers["r0"] == answers["r2"] == Encoded((0.5, 0.5), (0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize("name", [name for name, config in tiny.VARIANTS.items() if not config.has_decoder])
def test_a_batch_answers_what_each_input_gets_alone(name: str) -> None:
    config, rng = tiny.VARIANTS[name], random.Random(0)
    runtime = EncodingRuntime(tiny.graphs(config), SessionSettings(threads=1), classes=config.classes)
    inputs = {f"r{i}": tuple(tiny.token_ids(rng, rng.randint(1, 24))) for i in range(20)}

    def answers(batch_rows: int) -> dict[str, object]:
        engine = EncodingEngine(runtime, batch_rows=batch_rows, batch_tokens=120)
        for request_id, ids in inputs.items():
            engine.submit(EncodingRequest(id=request_id, input_ids=ids))
        return drain(engine)

    alone, together = answers(1), answers(16)
    for request_id in inputs:
        one, other = alone[request_id], together[request_id]
        assert isinstance(one, Encoded)
        assert isinstance(other, Encoded)
        assert len(one.probabilities) == config.classes
        assert len(one.vector) == config.d_model
        assert other.vector == pytest.approx(one.vector, abs=1e-5)
        assert other.probabilities == pytest.approx(one.probabilities, abs=1e-5)
        if config.classes:
            assert sum(one.probabilities) == pytest.approx(1.0)
