"""Penalties, bias, forbidden and stopping tokens in the running batch, against the reference decoder."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from model import decode as reference
from model.decoding_rules import Rules
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.requests import Adjustments, Finished, FinishReason, GenerationRequest, TokensReady
from tests import tiny
from tests.server.batch.requests import random_request, run

FAMILIES = ["encoder_decoder", "decoder_only"]
LETTERS = range(4, tiny.TOKENIZER.vocab_size)


def engine(family: str, rows: int = 16) -> Engine:
    config = tiny.shape(family)
    runtime = SequenceRuntime(
        tiny.graphs(config), SequenceShape.from_config(config.to_dict()), rows, SessionSettings(threads=1)
    )
    return Engine(
        runtime, start_token=reference.BOS, end_token=reference.EOS, join_tokens=24, text_stream=tiny.TOKENIZER.stream
    )


def with_options(rng: random.Random, plain: GenerationRequest) -> GenerationRequest:
    """The same request with some of the options, often enough that each shows."""

    def some(value, otherwise):
        return value if rng.random() < 0.4 else otherwise

    adjustments = Adjustments(
        repetition_penalty=some(rng.choice([0.7, 1.3, 3.0]), 1.0),
        frequency_penalty=some(rng.choice([-1.0, 0.5, 2.0]), 0.0),
        presence_penalty=some(rng.choice([-0.5, 1.5]), 0.0),
        token_bias=some(tuple((token, rng.uniform(-5, 5)) for token in rng.sample(range(2, 40), 3)), ()),
        no_repeat_ngram=some(rng.choice([1, 2, 3]), 0),
        suppressed_tokens=some(tuple(rng.sample(range(2, 40), 6)), ()),
    )
    decoding = replace(
        plain.decoding,
        adjustments=adjustments,
        stop_tokens=some(tuple(rng.sample(LETTERS, rng.randint(1, 5))), ()),
        stop_strings=some(tuple(tiny.TOKENIZER.decode(rng.choices(LETTERS, k=rng.choice([1, 1, 2]))) for _ in range(4)), ()),
    )
    if decoding.sampling:
        decoding = replace(decoding, sampling=replace(decoding.sampling, min_p=some(rng.choice([0.05, 0.5]), 0.0)))
    if decoding.beams > 1 and rng.random() < 0.4:
        phrases = tuple(tuple(rng.choices(LETTERS, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 3)))
        barred = {*decoding.adjustments.suppressed_tokens, *decoding.stop_tokens}
        phrases = tuple(phrase for phrase in phrases if not barred & set(phrase))
        if sum(map(len, phrases)) <= decoding.max_tokens:
            adjustments = replace(decoding.adjustments, no_repeat_ngram=0)
            decoding = replace(decoding, required_phrases=phrases, adjustments=adjustments, stop_strings=())
    elif decoding.rows <= 5 and rng.random() < 0.3:
        decoding = replace(decoding, alternatives=rng.randint(1, 3), hypotheses=1)
    forced = some(tuple(rng.choices(LETTERS, k=rng.randint(1, 3))), ())
    room = decoding.max_tokens - max(1, sum(map(len, decoding.required_phrases)))
    return replace(plain, decoding=decoding, forced=forced[: max(0, room)])


def rules(request: GenerationRequest) -> Rules:
    decoding, adjustments = request.decoding, request.decoding.adjustments
    return Rules(
        prefix=request.forced,
        min_tokens=decoding.min_tokens,
        repetition_penalty=adjustments.repetition_penalty,
        frequency_penalty=adjustments.frequency_penalty,
        presence_penalty=adjustments.presence_penalty,
        token_bias=dict(adjustments.token_bias),
        no_repeat_ngram=adjustments.no_repeat_ngram,
        suppressed_tokens=adjustments.suppressed_tokens,
        stop_tokens=decoding.stop_tokens,
        stop_strings=decoding.stop_strings,
        decode=tiny.TOKENIZER.decode,
        required_phrases=decoding.required_phrases,
    )


def expected(family: str, request: GenerationRequest, asked: Rules) -> list[reference.Hypothesis]:
    model, d = tiny.model(tiny.shape(family)), request.decoding
    if d.alternatives:
        found = []
        for i in range(d.alternatives):
            one = replace(request, decoding=replace(d, alternatives=0, hypotheses=i + 1))
            found.append(expected(family, one, replace(asked, alternative=i))[i if d.sampling else 0])
        return found
    if d.sampling:
        s = d.sampling
        drawn = {"seed": s.seed, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
        return [
            reference.sample(model, request.input_ids, max_tokens=d.max_tokens, sample_index=i, rules=asked, **drawn)
            for i in range(d.hypotheses)
        ]
    if d.beams == 1:
        return [reference.greedy(model, request.input_ids, d.max_tokens, rules=asked)]
    found = reference.beam_search(
        model,
        request.input_ids,
        beams=d.beams,
        max_tokens=d.max_tokens,
        length_penalty=d.length_penalty,
        patience=d.patience,
        rules=asked,
    )
    return found[: d.hypotheses]


def contains_all(tokens: tuple[int, ...], phrases: tuple[tuple[int, ...], ...]) -> bool:
    return all(any(tokens[i : i + len(p)] == p for i in range(len(tokens))) for p in phrases)


def check(family: str, request: GenerationRequest, events: list) -> None:
    *deltas, last = events
    assert isinstance(last, Finished)
    asked = rules(request)
    wanted = expected(family, request, asked)
    assert [list(h.tokens) for h in last.hypotheses] == [h.tokens for h in wanted], request
    for found, want in zip(last.hypotheses, wanted, strict=True):
        assert contains_all(found.tokens, request.decoding.required_phrases)
        np.testing.assert_allclose(found.log_probabilities, want.log_probabilities, rtol=1e-4, atol=1e-4)
        assert found.score == pytest.approx(want.score, rel=1e-4, abs=1e-4)
        stopped = asked.stop(found.tokens) is not None or found.tokens[-1] in asked.stop_tokens
        assert found.finish_reason is (
            FinishReason.END_OF_TEXT
            if found.tokens[-1] == reference.EOS
            else FinishReason.STOP
            if stopped
            else FinishReason.LENGTH
        )
    streamed: dict[int, list[tuple[int, float]]] = {}
    for delta in deltas:
        assert isinstance(delta, TokensReady)
        streamed.setdefault(delta.hypothesis, []).extend(zip(delta.tokens, delta.log_probabilities, strict=True))
    for index, tokens in streamed.items():
        whole = last.hypotheses[index]
        assert tokens == list(zip(whole.tokens, whole.log_probabilities, strict=True))
    assert bool(deltas) == request.stream


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_mixed_batch_with_options_gives_what_the_reference_decoder_gives(family: str, seed: int) -> None:
    """Requests with and without options, of every kind, joining at random; some are cancelled on the way."""
    rng = random.Random(seed)
    requests = [random_request(rng, f"r{i}") for i in range(90)]
    requests = [with_options(rng, request) if i % 3 else request for i, request in enumerate(requests)]
    running = engine(family)
    doomed = [with_options(rng, random_request(rng, f"doomed{i}")) for i in range(20)]
    step, steps = running.step, 0

    def step_and_cancel():
        nonlocal steps
        steps += 1
        if doomed and steps % 3 == 0:
            running.submit(doomed[-1])
        elif doomed and steps % 3 == 2:
            running.cancel(doomed.pop().id)
        happened, stats = step()
        return [(name, event) for name, event in happened if not name.startswith("doomed")], stats

    running.step = step_and_cancel  # type: ignore[method-assign]
    events = run(running, requests, rng)
    for request in requests:
        check(family, request, events[request.id])
    assert running.groups.all_plain
    assert not (running.groups.adjusted or running.groups.with_stop_tokens or running.groups.followed)
