"""Our engine and CTranslate2 agree on a model that both were given, and what would differ is named for what it is."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from model.decode import EOS, beam_search
from tests import tiny

pytest.importorskip("ctranslate2", reason="the peer is not a dependency: pip install ctranslate2")

from tests.bench.agreement import Output, Search, explain, our_outputs, peers_outputs, reference_score, rounded

RUN = tiny.run(tiny.shape("encoder_decoder"), examples=30)
SOURCES = [RUN.tokenizer.encode_source(example["source"]) for example in RUN.held_out]
SEARCH = Search(beams=4, max_tokens=20, length_penalty=0.8, coverage_penalty=0.3)


def test_outputs_and_scores_are_the_same_with_a_coverage_penalty_too() -> None:
    for ours, peers in zip(our_outputs(RUN, SOURCES, SEARCH, 16), peers_outputs(RUN, SOURCES, SEARCH), strict=True):
        assert ours.tokens == peers.tokens
        assert ours.score == pytest.approx(peers.score, abs=1e-3)


def test_differences_are_explained() -> None:
    plain = replace(SEARCH, coverage_penalty=0.0)
    searches = ((source, *beam_search(RUN.model, source, **asdict(plain))[:2]) for source in SOURCES)
    source, best, second = next(
        (source, best, second)
        for source, best, second in searches
        if best.tokens[-1] == second.tokens[-1] == EOS and best.score > second.score + 0.01
    )
    ours, worse = Output(best.tokens, best.score), Output(second.tokens, second.score)
    assert reference_score(RUN, source, best.tokens, plain) == pytest.approx(best.score, abs=1e-4)
    assert explain(RUN, source, ours, worse, plain) == "?"
    assert explain(RUN, source, ours, ours, plain) == "tie"
    cut = Output([token if token != EOS else 5 for token in second.tokens], second.score)
    assert explain(RUN, source, ours, cut, replace(plain, max_tokens=len(cut.tokens))) == "limit"


def test_rounding_is_small_and_never_the_same() -> None:
    states = RUN.model.output_weight[:3]
    exact = RUN.model.logits(states)
    first, second = (rounded(RUN.model, seed).logits(states) for seed in (0, 1))
    assert 0 < (first - exact).abs().max() < 1e-4
    assert not first.equal(second)
