"""What tests of the engine share: random requests, what the reference decoder answers, and a batch that they join at random."""

from __future__ import annotations

import random

from model import decode as reference
from server.batch.engine import Engine
from server.requests import Decoding, GenerationRequest, Sampling
from tests import tiny

FAMILIES = ["encoder_decoder", "decoder_only"]


def random_request(rng: random.Random, name: str) -> GenerationRequest:
    ids = tuple(rng.randrange(4, 40) for _ in range(rng.randint(1, 20)))
    max_tokens = rng.randint(1, 20)
    common = {"max_tokens": max_tokens, "min_tokens": rng.choice([0, 0, rng.randint(0, max_tokens)])}
    kind = rng.choice(["greedy", "beam", "sample"])
    if kind == "beam":
        beams = rng.choice([2, 3, 4, 5, 8])
        decoding = Decoding(
            beams=beams,
            hypotheses=rng.randint(1, beams),
            length_penalty=rng.choice([0.0, 0.6, 1.0]),
            patience=rng.choice([1.0, 1.0, 0.6, 1.7]),
            **common,
        )
    elif kind == "sample":
        sampling = Sampling(
            seed=rng.getrandbits(64),
            temperature=rng.choice([0.5, 1.0, 1.7]),
            top_k=rng.choice([0, 1, 5, 30]),
            top_p=rng.choice([0.3, 0.9, 1.0]),
        )
        decoding = Decoding(hypotheses=rng.randint(1, 4), sampling=sampling, **common)
    else:
        decoding = Decoding(**common)
    return GenerationRequest(id=name, input_ids=ids, decoding=decoding, stream=rng.random() < 0.5)


def expected(family: str, request: GenerationRequest) -> list[reference.Hypothesis]:
    model, d = tiny.model(tiny.shape(family)), request.decoding
    lengths = {"max_tokens": d.max_tokens, "min_tokens": d.min_tokens}
    if d.sampling:
        s = d.sampling
        return [
            reference.sample(
                model,
                request.input_ids,
                seed=s.seed,
                sample_index=i,
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                **lengths,
            )
            for i in range(d.hypotheses)
        ]
    if d.beams == 1:
        return [reference.greedy(model, request.input_ids, **lengths)]
    found = reference.beam_search(
        model, request.input_ids, beams=d.beams, length_penalty=d.length_penalty, patience=d.patience, **lengths
    )
    return found[: d.hypotheses]


def run(engine: Engine, requests: list[GenerationRequest], rng: random.Random) -> dict[str, list]:
    """Submits requests at random moments and steps until all have ended."""
    events: dict[str, list] = {request.id: [] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), rng.randint(0, 3))):
            engine.submit(waiting.pop())
        if engine.has_work:
            happened, stats = engine.step()
            assert stats.live_rows <= stats.row_capacity
            for request_id, event in happened:
                events[request_id].append(event)
    return events
