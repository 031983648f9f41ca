"""Eight-bit graphs stay near the trained model, and answer the same bits whatever stands beside a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.graph_runner import SequenceGraphs
from export.quantize import InputRange
from tests import tiny
from tests.export.test_graphs import examples, full_forward

FAMILIES = ["encoder_decoder", "decoder_only"]


def eight_bit(family: str) -> SequenceGraphs:
    config = tiny.shape(family)
    return SequenceGraphs(tiny.graphs(config, precision="int8"), config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_in_any_company(family: str) -> None:
    graphs = eight_bit(family)
    inputs, targets = examples(graphs.config)
    alone = [graphs.forced([i], [t])[0] for i, t in zip(inputs, targets, strict=True)]
    for stagger in (0, 2):
        assert all(map(np.array_equal, graphs.forced(inputs, targets, stagger=stagger), alone))
    if family == "decoder_only":
        for chunk in (1, 5):
            assert all(map(np.array_equal, graphs.forced(inputs, targets, chunk=chunk), alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_near_the_trained_model(family: str) -> None:
    graphs = eight_bit(family)
    inputs, targets = examples(graphs.config)
    found = graphs.forced(inputs, targets)
    wanted = [full_forward(graphs.config, i, t) for i, t in zip(inputs, targets, strict=True)]
    difference = np.abs(np.concatenate(found) - np.concatenate(wanted))
    assert difference.mean() < 0.25  # of logits with a standard deviation of 2
    assert difference.max() < 2.0


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20), min_size=1, max_size=5))
def test_a_range_holds_zero_and_most_values(calls: list[list[float]]) -> None:
    observed = InputRange()
    for values in calls:
        observed.add(torch.tensor(values))
    scale, zero = observed.scale_and_zero()
    assert scale > 0
    assert 0 <= zero <= 255  # so that zero, which padding and ReLU are full of, is exact
    whole = torch.cat(observed.samples)

    def error(scale: float, zero: int) -> float:
        rounded = ((whole / scale).round() + zero).clamp(0, 255)
        return float(((rounded - zero) * scale - whole).square().mean())

    plain = max(1e-8, (observed.high - observed.low) / 255)
    assert error(scale, zero) <= error(plain, round(-observed.low / plain)) * (1 + 1e-5) + 1e-12
