"""The running batch of a bundle with a shortlist: the restricted model's reference decoder, and what callers are told."""

from __future__ import annotations

import random

import numpy as np
import pytest

from export.shortlist import restrict
from model import decode as reference
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.edge.door import Door
from server.requests import Decoding, DecodingOptions, Finished, GenerationRequest, InvalidRequest
from tests import tiny
from tests.server.batch import test_engine_options as options
from tests.server.batch.requests import random_request, run
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import TOKENIZER, served_model

CONFIG = tiny.shape("encoder_decoder")
SHORTLIST = tuple(i for i in range(CONFIG.vocab_size) if i % 5 != 4)


def engine() -> Engine:
    shape = SequenceShape.from_config(CONFIG.to_dict())
    graphs = tiny.graphs(CONFIG, shortlist=SHORTLIST)
    runtime = SequenceRuntime(graphs, shape, 16, SessionSettings(threads=1), shortlist=SHORTLIST)
    return Engine(runtime, start_token=1, end_token=2, join_tokens=24, text_stream=tiny.TOKENIZER.stream)


def test_every_kind_of_request_gives_what_the_restricted_model_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    requests = [options.with_options(rng, random_request(rng, f"r{i}")) for i in range(120)]
    requests = [r for r in requests if all(t in SHORTLIST for part in (r.forced, *r.decoding.required_phrases) for t in part)]
    assert len(requests) > 60
    events = run(engine(), requests, rng)
    restricted = restrict(tiny.model(CONFIG), SHORTLIST)
    monkeypatch.setattr(tiny, "model", lambda config: restricted)
    for request in requests:
        last = events[request.id][-1]
        assert isinstance(last, Finished)
        wanted = options.expected("encoder_decoder", request, options.rules(request))
        assert [list(h.tokens) for h in last.hypotheses] == [h.tokens for h in wanted], request
        for found, want in zip(last.hypotheses, wanted, strict=True):
            np.testing.assert_allclose(found.log_probabilities, want.log_probabilities, atol=1e-4)


def test_a_target_is_scored_among_the_tokens_of_the_shortlist() -> None:
    source, target = (7, 20, 8), tuple(t for t in range(4, 20) if t in SHORTLIST)
    decoding = Decoding(max_tokens=len(target))
    request = GenerationRequest(id="s", input_ids=source, decoding=decoding, forced=target, forced_only=True)
    (finished,) = run(engine(), [request], random.Random(0))["s"]
    wanted = reference.score(restrict(tiny.model(CONFIG), SHORTLIST), source, target)
    np.testing.assert_allclose(finished.hypotheses[0].log_probabilities, wanted, atol=1e-4)


# The door


def door(text: str) -> Door:
    """Of a model that writes only the characters of ``text``."""
    return Door(served_model(FakeEngine(), shortlist=frozenset([0, 1, 2, 3, *TOKENIZER.encode_text(text)])))


async def test_what_outputs_cannot_contain_is_refused_by_name() -> None:
    narrow, (outside,) = door("abcd"), TOKENIZER.encode_text("x")
    complaint = f"contains token id {outside}, which is not in the model's shortlist of 8"
    with pytest.raises(InvalidRequest, match=f"^target_prefix: {complaint}"):
        await narrow.check_generation("c", ["xyz"], DecodingOptions(), target_prefix="ax")
    with pytest.raises(InvalidRequest, match=rf"^options\.required_phrases\[1\]\.text: {complaint}"):
        await narrow.check_generation("c", ["xyz"], DecodingOptions(beams=2, required_phrases=("ab", "x")))
    with pytest.raises(InvalidRequest, match=rf"^pairs\[0\]\.target\.tokens: {complaint}"):
        await narrow.check_scoring("c", [("xyz", (outside, 2))])
    with pytest.raises(InvalidRequest, match=rf"^pairs\[1\]\.target\.text: {complaint}"):
        await narrow.check_scoring("c", [("xyz", "abc"), ("xyz", "abx")])


async def test_sources_and_options_may_name_any_token() -> None:
    narrow, (outside,) = door("abcd"), TOKENIZER.encode_text("x")
    anything = DecodingOptions(token_bias=((outside, 2.0),), suppressed_tokens=(outside,), stop_tokens=(outside,))
    (request,) = await narrow.check_generation("c", ["xyz"], anything, target_prefix="ab")
    assert request.input_ids == (*TOKENIZER.encode_text("xyz"), 2)


async def test_options_must_leave_something_of_the_shortlist() -> None:
    narrow = door("abcd")
    every = tuple(range(8 + 4))  # specials and "0123..." or what else comes first
    within = tuple(sorted([0, 1, 2, 3, *TOKENIZER.encode_text("abcd")]))
    await narrow.check_generation("c", ["xyz"], DecodingOptions(suppressed_tokens=within[1:]))
    with pytest.raises(InvalidRequest, match=r"^options\.suppressed_tokens: .*leave no token to choose"):
        await narrow.check_generation("c", ["xyz"], DecodingOptions(suppressed_tokens=(*every, *within)))
    with pytest.raises(InvalidRequest, match=r"^options\.alternatives: leave too few"):
        await narrow.check_generation("c", ["xyz"], DecodingOptions(alternatives=4, suppressed_tokens=within[4:]))
