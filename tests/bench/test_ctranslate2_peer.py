"""The peer's model says what ours says: the same weights, the same search, the same texts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.decode import EOS, beam_search, greedy
from tests import tiny
from tests.bench.natural import natural_length, natural_model, source_of
from tests.bench.shapes import SHAPES

ctranslate2 = pytest.importorskip("ctranslate2", reason="the peer is not a dependency: pip install ctranslate2")

from tests.bench.ctranslate2_peer import NotConvertible, convert, ids, words  # noqa: E402

SOURCES, MAX_TOKENS = 120, 20
MODELS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "pre-norm": {"norm": "pre", "activation": "gelu"},
    "learned positions": {"positions": "learned", "tied_embeddings": "none", "bias": False},
    "one layer at every depth": {"share_layers": True, "scale_embeddings": False, "decoder_layers": 3},
}


def sources(config: ModelConfig) -> list[list[int]]:
    rng = random.Random(3)
    return [tiny.token_ids(rng, rng.randint(1, config.max_source_length), config.vocab_size) for _ in range(SOURCES)]


def translate(folder: Path, inputs: list[list[int]], **options: Any) -> list[Any]:
    translator = ctranslate2.Translator(str(folder), intra_threads=1)
    options = {"max_decoding_length": MAX_TOKENS, "min_decoding_length": 0, "return_end_token": True} | options
    return translator.translate_batch([words(source) for source in inputs], return_scores=True, **options)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_greedy_is_the_reference_decoder(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny.shape("encoder_decoder", **changes)
    inputs = sources(config)
    found = translate(convert(tiny.model(config), tmp_path), inputs, beam_size=1)
    for source, result in zip(inputs, found, strict=True):
        wanted = greedy(tiny.model(config), source, MAX_TOKENS)
        assert ids(result.hypotheses[0]) == wanted.tokens
        assert result.scores[0] == pytest.approx(wanted.score, abs=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_beam_search_is_the_reference_decoder(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny.shape("encoder_decoder", **changes)
    inputs = sources(config)
    found = translate(convert(tiny.model(config), tmp_path), inputs, beam_size=4)
    for source, result in zip(inputs, found, strict=True):
        wanted = beam_search(tiny.model(config), source, beams=4, max_tokens=MAX_TOKENS)[0]
        assert ids(result.hypotheses[0]) == wanted.tokens
        assert result.scores[0] == pytest.approx(wanted.score, abs=1e-4)


@pytest.mark.parametrize(("patience", "length_penalty"), [(1.0, 0.6), (2.0, 1.0), (0.5, 1.0)])
def test_every_hypothesis_is_the_reference_decoders(patience: float, length_penalty: float, tmp_path: Path) -> None:
    config = tiny.shape("encoder_decoder")
    inputs = sources(config)
    count = round(4 * min(1.0, patience))
    options: dict[str, Any] = {"patience": patience, "length_penalty": length_penalty}
    found = translate(convert(tiny.model(config), tmp_path), inputs, beam_size=4, num_hypotheses=count, **options)
    for source, result in zip(inputs, found, strict=True):
        wanted = beam_search(tiny.model(config), source, beams=4, max_tokens=MAX_TOKENS, **options)
        assert [ids(hypothesis) for hypothesis in result.hypotheses] == [w.tokens for w in wanted[:count]]


def test_at_the_length_limit_the_peer_weighs_unfinished_hypotheses_too(tmp_path: Path) -> None:
    config, limit = tiny.shape("encoder_decoder"), 4
    inputs = sources(config)
    found = translate(convert(tiny.model(config), tmp_path), inputs, beam_size=4, max_decoding_length=limit)
    different = 0
    for source, result in zip(inputs, found, strict=True):
        tokens, wanted = ids(result.hypotheses[0]), beam_search(tiny.model(config), source, beams=4, max_tokens=limit)
        if tokens != wanted[0].tokens:
            different += 1
            assert len(tokens) == limit
            assert tokens[-1] != EOS
            assert result.scores[0] > wanted[0].score
            assert all(w.tokens[-1] == EOS for w in wanted)
    assert 0 < different < SOURCES / 10


def test_a_minimum_length_changes_scores_but_not_greedy_texts(tmp_path: Path) -> None:
    config = tiny.shape("encoder_decoder")
    inputs = sources(config)
    found = translate(convert(tiny.model(config), tmp_path), inputs, beam_size=1, min_decoding_length=8)
    wanted = [greedy(tiny.model(config), source, MAX_TOKENS, min_tokens=8) for source in inputs]
    assert [ids(result.hypotheses[0]) for result in found] == [w.tokens for w in wanted]
    assert all(result.scores[0] >= w.score - 1e-4 for result, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("beams", [1, 4])
def test_natural_texts_end_where_their_sources_do(beams: int, precision: str, tmp_path: Path) -> None:
    model = natural_model(SHAPES["tiny"])
    rng = random.Random(5)
    inputs = [source_of(rng, natural_length(rng), model.config.vocab_size) for _ in range(SOURCES)]
    found = translate(convert(model, tmp_path, precision), inputs, beam_size=beams, max_decoding_length=64)
    assert [len(result.hypotheses[0]) for result in found] == [len(source) for source in inputs]
    if precision == "fp32":
        for source in inputs[:10]:
            wanted = greedy(model, source, 64) if beams == 1 else beam_search(model, source, beams=beams, max_tokens=64)[0]
            assert len(wanted.tokens) == len(source)


def test_names_every_reason_why_a_model_cannot_be_converted(tmp_path: Path) -> None:
    config = tiny.shape("encoder_decoder", positions="rotary", heads=2, kv_heads=1)
    with pytest.raises(NotConvertible, match="rotary, it has fewer key/value heads"):
        convert(tiny.model(config), tmp_path)
