"""The engine against the reference decoder: the same tokens, whatever shares the batch and whenever a request joins."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from export.quantize import Int8Linear
from model import decode as reference
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.requests import Decoding, Failed, Failure, Finished, FinishReason, GenerationRequest, Sampling, TokensReady
from tests import tiny
from tests.server.batch.requests import FAMILIES, expected, random_request, run


def engine(family: str, rows: int = 16, join_tokens: int = 24, precision: str = "fp32") -> Engine:
    config = tiny.shape(family)
    runtime = SequenceRuntime(
        tiny.graphs(config, precision=precision), SequenceShape.from_config(config.to_dict()), rows, SessionSettings(threads=1)
    )
    runtime.step_rows = 7  # a step over more rows takes several runs
    runtime.encoding_overhead = 1e-4  # some wait for company
    return Engine(runtime, start_token=reference.BOS, end_token=reference.EOS, join_tokens=join_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_gives_what_the_reference_decoder_gives(family: str) -> None:
    rng = random.Random(1)
    requests = [random_request(rng, f"r{i}") for i in range(120)]
    events = run(engine(family), requests, rng)
    for request in requests:
        *deltas, last = events[request.id]
        assert isinstance(last, Finished)
        wanted = expected(family, request)
        assert [list(h.tokens) for h in last.hypotheses] == [h.tokens for h in wanted], request
        for found, want in zip(last.hypotheses, wanted, strict=True):
            np.testing.assert_allclose(found.log_probabilities, want.log_probabilities, atol=1e-4)
            assert found.score == pytest.approx(
                found.log_probability / len(found.tokens) ** request.decoding.length_penalty, abs=1e-4
            )
            assert (found.finish_reason is FinishReason.END_OF_TEXT) == (want.tokens[-1] == reference.EOS)
        assert bool(deltas) == request.stream
        streamed: dict[int, list[tuple[int, float]]] = {}
        for delta in deltas:
            assert isinstance(delta, TokensReady)
            streamed.setdefault(delta.hypothesis, []).extend(zip(delta.tokens, delta.log_probabilities, strict=True))
        for index, tokens in streamed.items():
            whole = last.hypotheses[index]
            assert tokens == list(zip(whole.tokens, whole.log_probabilities, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_account_for_every_request_and_token(family: str) -> None:
    rng = random.Random(7)
    running = engine(family, rows=8, join_tokens=10)
    requests = [r for r in (random_request(rng, f"r{i}") for i in range(60)) if r.decoding.beams == 1]
    written, waited, encoded, joined = 0, list[float](), 0, 0
    for request in requests:
        running.submit(request)
    while running.has_work:
        waiting, live = len(running.scheduler), running.rows.live
        events, stats = running.step()
        ended = sum(isinstance(event, Finished) for _, event in events)
        written, encoded, joined = written + stats.new_tokens, encoded + stats.encoded_tokens, joined + len(stats.joined)
        waited += stats.queue_seconds
        assert stats.encoded_tokens <= 10 or (family == "encoder_decoder" and len(stats.joined) == 1)
        assert live <= stats.rows <= stats.row_capacity == 8
        assert stats.live_rows == running.rows.live
        assert len(requests) == joined + stats.waiting_requests
        assert stats.waiting_requests <= waiting + 1
        assert stats.live_requests + ended >= len(stats.joined)
        assert stats.waiting_tokens == sum(len(w.request.input_ids) for w in running.scheduler)
        assert 0.0 <= stats.runtime_seconds <= stats.seconds
    assert joined == len(waited) == len(requests)
    assert min(waited) >= 0.0
    assert encoded == sum(len(r.input_ids) - (family == "decoder_only") for r in requests)
    assert written == sum(len(h.tokens) for r in requests for h in expected(family, r))
    assert (stats.live_rows, stats.live_requests, stats.waiting_requests, stats.waiting_tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_greedy_requests_alone_gives_what_the_reference_decoder_gives(family: str) -> None:
    """A third of them streamed, and a third of a least length."""
    rng = random.Random(7)
    requests = []
    for i in range(60):
        decoding = Decoding(max_tokens=rng.randint(5, 20), min_tokens=rng.choice([0, 0, 5]))
        requests.append(replace(random_request(rng, f"r{i}"), decoding=decoding, stream=i % 3 == 0))
    running = engine(family)
    events = run(running, requests, rng)
    assert running.groups.all_plain
    for request in requests:
        *deltas, last = events[request.id]
        (hypothesis,) = last.hypotheses
        (wanted,) = expected(family, request)
        assert list(hypothesis.tokens) == wanted.tokens
        np.testing.assert_allclose(hypothesis.log_probabilities, wanted.log_probabilities, atol=1e-4)
        written = zip(hypothesis.tokens, hypothesis.log_probabilities, strict=True) if request.stream else ()
        assert deltas == [TokensReady(0, (token,), (score,)) for token, score in written]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_given_target_equal_one_full_forward_pass(family: str) -> None:
    rng = random.Random(2)
    target = (5, 9, 33, 12, reference.EOS)
    requests = [
        GenerationRequest(
            id=f"score{i}",
            input_ids=tuple(rng.randrange(4, 40) for _ in range(3 + i)),
            decoding=Decoding(max_tokens=len(target)),
            forced=target,
            forced_only=True,
        )
        for i in range(4)
    ]
    events = run(engine(family), [*requests, *(random_request(rng, f"noise{i}") for i in range(10))], rng)
    for request in requests:
        (hypothesis,) = events[request.id][-1].hypotheses
        assert hypothesis.tokens == target
        wanted = reference.score(tiny.model(tiny.shape(family)), request.input_ids, target)
        np.testing.assert_allclose(hypothesis.log_probabilities, wanted, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 4])
def test_every_hypothesis_begins_with_the_forced_prefix(beams: int) -> None:
    prefix = (7, 7, 30)
    request = GenerationRequest(
        id="r", input_ids=(4, 5, 6, 2), decoding=Decoding(max_tokens=12, beams=beams, hypotheses=beams), forced=prefix
    )
    (*_, last) = run(engine("encoder_decoder"), [request], random.Random(0))["r"]
    assert len(last.hypotheses) == beams
    for hypothesis in last.hypotheses:
        assert hypothesis.tokens[:3] == prefix
        wanted = reference.score(tiny.model(tiny.shape("encoder_decoder")), request.input_ids, hypothesis.tokens)
        np.testing.assert_allclose(hypothesis.log_probabilities, wanted, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_does_not_depend_on_its_neighbours(family: str, precision: str) -> None:
    """The same tokens and, in eight bits, the same scores to the last bit: no scale is taken from the batch."""
    rng = random.Random(6)
    running = engine(family, rows=24, precision=precision)
    requests = [random_request(rng, f"r{i}") for i in range(60)]
    together = run(running, requests, rng)
    for request in requests:
        alone = run(running, [request], rng)[request.id][-1].hypotheses
        crowded = together[request.id][-1].hypotheses
        assert [h.tokens for h in alone] == [h.tokens for h in crowded]
        if precision == "int8":
            assert [h.log_probabilities for h in alone] == [h.log_probabilities for h in crowded]


def test_a_scale_taken_from_the_batch_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above is able to fail: it does with the usual dynamic quantisation, one scale for all rows."""

    def dynamic(self: Int8Linear, x: torch.Tensor) -> torch.Tensor:
        inputs = [x, self.weight, self.weight_scale, None, self.bias]
        shape = (*x.shape[:-1], self.outputs)
        return torch.onnx.ops.symbolic("com.microsoft::DynamicQuantizeMatMul", inputs, dtype=x.dtype, shape=shape, version=1)

    monkeypatch.setattr(Int8Linear, "forward", dynamic)
    config, rng = tiny.shape("encoder_decoder"), random.Random(6)
    folder = tiny.graphs.__wrapped__(config, 0, "int8")  # not the one kept for other tests
    runtime = SequenceRuntime(folder, SequenceShape.from_config(config.to_dict()), 24, SessionSettings(threads=1))
    running = Engine(runtime, start_token=1, end_token=2)
    requests = [random_request(rng, f"r{i}") for i in range(60)]
    together = run(running, requests, rng)
    alone = {request.id: run(running, [request], rng)[request.id] for request in requests}
    assert any(alone[r.id][-1] != together[r.id][-1] for r in requests)


@pytest.mark.parametrize("family", FAMILIES)
def test_cancelled_requests_free_their_rows_at_once_and_disturb_nobody(family: str) -> None:
    rng = random.Random(3)
    running = engine(family, rows=12)
    kept = [random_request(rng, f"kept{i}") for i in range(20)]
    events: dict[str, list] = {request.id: [] for request in kept}
    doomed = [random_request(rng, f"doomed{i}") for i in range(60)]
    for pair in zip(doomed[::3], doomed[1::3], doomed[2::3], strict=True):
        for request in pair:
            running.submit(request)
        if kept:
            running.submit(kept.pop())
        for _ in range(rng.randint(0, 4)):
            if running.has_work:
                for request_id, event in running.step()[0]:
                    events.setdefault(request_id, []).append(event)
        for request in pair:
            running.cancel(request.id)
    while running.has_work:
        for request_id, event in running.step()[0]:
            events.setdefault(request_id, []).append(event)
    assert running.rows.live == 0
    rng = random.Random(3)
    for request in [random_request(rng, f"kept{i}") for i in range(20)]:
        assert [list(h.tokens) for h in events[request.id][-1].hypotheses] == [h.tokens for h in expected(family, request)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "kind",
    [{"beams": 3}, {"hypotheses": 3, "sampling": Sampling(seed=1)}, {"beams": 2, "alternatives": 3}],
    ids=["beams", "samples", "alternatives"],
)
def test_scores_that_are_not_numbers_fail_only_their_request(kind: dict, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    running = engine("encoder_decoder")
    decode = running.model.decode
    decoding = Decoding(max_tokens=20, min_tokens=19, **kind)
    sick = GenerationRequest(id="sick", input_ids=(4, 5, 6), decoding=decoding, stream=stream)

    def poisoned(tokens, positions, top_k, *, keep_logits):
        candidates = decode(tokens, positions, top_k, keep_logits=keep_logits)
        group = running.groups.of_request("sick")
        own = np.flatnonzero(running.hypotheses.group[: len(tokens)] == group.number) if group else []
        if len(own) and running.hypotheses.length[own].max() >= 2:
            candidates.log_probabilities[own[:1]] = np.nan  # one of its rows
        return candidates

    monkeypatch.setattr(running.model, "decode", poisoned)
    healthy = [random_request(rng, f"r{i}") for i in range(10)]
    events = run(running, [*healthy, sick], rng)
    *deltas, last = events["sick"]
    assert last == Failed(Failure.NUMERICS, "the model's scores are not finite for this input")
    assert not deltas or stream
    assert running.rows.live == len(running.groups) == 0
    for request in healthy:
        assert tokens_of(events[request.id]) == [h.tokens for h in expected("encoder_decoder", request)]


def tokens_of(events: list) -> list[list[int]]:
    return [list(hypothesis.tokens) for hypothesis in events[-1].hypotheses]


KINDS = {
    "greedy": {},
    "beams": {"beams": 4, "hypotheses": 4},
    "samples from all": {"hypotheses": 3, "sampling": Sampling(seed=5)},
    "samples from a few": {"hypotheses": 3, "sampling": Sampling(seed=5, top_k=3, temperature=2.0)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_ends_before_its_least_length(family: str, kind: str) -> None:
    rng = random.Random(8)
    requests = [
        GenerationRequest(
            id=f"r{i}",
            input_ids=tuple(tiny.token_ids(rng, rng.randint(1, 20))),
            decoding=Decoding(max_tokens=14, min_tokens=rng.choice([0, 4, 13, 14]), **KINDS[kind]),
        )
        for i in range(16)
    ]
    events = run(engine(family), requests, rng)
    for request in requests:
        found = tokens_of(events[request.id])
        assert all(reference.EOS not in tokens[: request.decoding.min_tokens] for tokens in found)
        assert found == [h.tokens for h in expected(family, request)]


def test_beams_wider_than_the_vocabulary() -> None:
    """Some beams hold nothing at first, and must come alive with their parent's position and text."""
    config = tiny.shape("decoder_only", vocab_size=6)
    shape = SequenceShape.from_config(config.to_dict())
    runtime = SequenceRuntime(tiny.graphs(config), shape, 20, SessionSettings(threads=1))
    running = Engine(runtime, start_token=reference.BOS, end_token=reference.EOS)
    rng = random.Random(9)
    requests = [
        GenerationRequest(
            id=f"r{i}",
            input_ids=tuple(rng.choices([4, 5], k=rng.randint(1, 6))),
            decoding=Decoding(max_tokens=6, min_tokens=rng.choice([0, 3]), beams=beams, hypotheses=beams, patience=2.0),
            stream=True,
        )
        for i, beams in enumerate([8, 2, 16, 7, 4, 8])
    ]
    events = run(running, requests, rng)
    for request in requests:
        wanted = reference.beam_search(
            tiny.model(config),
            request.input_ids,
            beams=request.decoding.beams,
            max_tokens=6,
            min_tokens=request.decoding.min_tokens,
            patience=2.0,
        )
        assert tokens_of(events[request.id]) == [h.tokens for h in wanted]


def test_a_source_waits_for_company_while_others_run() -> None:
    running, now = engine("encoder_decoder"), [0.0]
    running.clock = lambda: now[0]
    running.model.encoding_overhead = 2.0

    def submit(name: str) -> None:
        running.submit(GenerationRequest(id=name, input_ids=(5, 6), decoding=Decoding(max_tokens=16, min_tokens=16)))

    def joined_at(time: float) -> tuple[str, ...]:
        now[0] = time
        return running.step()[1].joined

    submit("first")
    assert joined_at(0.0) == ("first",)  # nobody runs yet
    submit("second")
    assert joined_at(1.0) == ()
    assert joined_at(2.75) == ()
    submit("third")
    assert joined_at(2.875) == ()
    assert joined_at(3.0) == ("second", "third")  # together they have waited for 2 s, as long as "first" will
    for name in ("fourth", "fifth"):
        submit(name)
    assert joined_at(4.0) == ()
    assert joined_at(6.5) == ()
    assert joined_at(7.0) == ("fourth", "fifth")  # three run now


def test_sources_enough_for_a_step_wait_for_nobody() -> None:
    running = engine("encoder_decoder", join_tokens=6)
    running.clock = lambda: 0.0
    running.model.encoding_overhead = 2.0
    for name in ("first", "second", "third"):
        running.submit(GenerationRequest(id=name, input_ids=(5, 6, 7), decoding=Decoding(max_tokens=16, min_tokens=16)))
    assert running.step()[1].joined == ("first", "second")
    assert running.step()[1].joined == ()
    running.submit(GenerationRequest(id="fourth", input_ids=(5, 6, 7), decoding=Decoding(max_tokens=16, min_tokens=16)))
    assert running.step()[1].joined == ("third", "fourth")
