"""Alignments and coverage in the reference decoder."""

from __future__ import annotations

import math

import pytest
import torch

from model.alignment import LEAST_SEEN, alignment_weights, coverage, cross_attention_weights
from model.decode import BOS, beam_search, normalised
from tests import tiny

MODEL = tiny.model(tiny.shape("encoder_decoder"))
SOURCE, OUTPUT = [7, 30, 12, 2], [20, 21, 9]


def test_alignment_is_of_the_last_layer_averaged_over_heads_and_of_each_token_when_it_was_chosen() -> None:
    found = alignment_weights(MODEL, SOURCE, OUTPUT)
    assert found.shape == (3, 4)
    assert torch.equal(found, cross_attention_weights(MODEL, SOURCE, [BOS, 20, 21])[-1].mean(0))
    torch.testing.assert_close(found[:2], alignment_weights(MODEL, SOURCE, [20, 21]))  # what comes later changes nothing


def test_coverage_is_equation_14() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.75, 0.25, 0.0, 0.0]])
    assert coverage(weights) == pytest.approx(math.log(0.5) + math.log(0.25) + math.log(LEAST_SEEN))
    assert coverage(torch.eye(3)) == 0.0
    assert coverage(torch.ones(5, 3)) == 0.0


def test_the_coverage_penalty_is_added_to_scores_and_ranks_again() -> None:
    changed = 0
    for first in range(4, 24):
        source = [first, 9, 30, 17, 2]
        plain = beam_search(MODEL, source, beams=4, max_tokens=12, length_penalty=0.6)
        covered = beam_search(MODEL, source, beams=4, max_tokens=12, length_penalty=0.6, coverage_penalty=0.7)
        for h in covered:
            penalty = 0.7 * coverage(alignment_weights(MODEL, source, h.tokens))
            assert h.score == pytest.approx(normalised(h.log_probability, len(h.tokens), 0.6) + penalty, abs=1e-5)
        assert [h.score for h in covered] == sorted((h.score for h in covered), reverse=True)
        changed += [h.tokens for h in covered] != [h.tokens for h in plain]
    assert changed > 3
