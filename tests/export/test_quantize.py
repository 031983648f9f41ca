"""Eight-bit graphs stay near the trained model, and answer the same bits whatever stands beside a row."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from export.graph_runner import SequenceGraphs, open_graph
from export.quantize import InputRange, Int8FeedForward, Int8Linear
from model.layers import FeedForward
from server.device.session import SessionSettings, open_session
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


@pytest.mark.parametrize("served", [False, True], ids=["verified", "served"])
@pytest.mark.parametrize("kind", ["product", "feed forward"])
def test_the_largest_sums_do_not_saturate(kind: str, served: bool, tmp_path: Path) -> None:
    """Inputs and weights are the largest. Some processors add two products in 16 bits, which these do not fit into."""
    config = tiny.shape("encoder_decoder")
    trained = nn.Linear(config.d_model, 8) if kind == "product" else FeedForward(config)
    with torch.no_grad():
        for linear in (m for m in trained.modules() if isinstance(m, nn.Linear)):
            linear.weight.fill_(1 / linear.in_features)
            linear.bias.zero_()
            linear.input_range = InputRange()
            linear.input_range.add(torch.tensor([0.0, 1.0]))
    module = Int8Linear(trained) if kind == "product" else Int8FeedForward(trained)
    x, path = torch.ones(2, config.d_model), tmp_path / "graph.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the exporter itself uses
        torch.onnx.export(module.eval(), (x,), path, input_names=["x"], dynamo=True, external_data=False, verbose=False)
    session = open_session(path, SessionSettings(threads=1)) if served else open_graph(path)
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, 1.0, rtol=0.02)


@pytest.mark.parametrize("name", [name for name, config in tiny.VARIANTS.items() if config.has_decoder])
def test_no_two_products_share_weights_or_zero_points_of_these(name: str) -> None:
    """ONNX Runtime could not make such weights unsigned, where a processor wants them so."""
    graph = onnx.load(tiny.graphs(tiny.VARIANTS[name], precision="int8") / "decode.onnx").graph
    weights = {"MatMulIntegerToFloat": (1, 5), "QGemm": (3, 5)}
    uses = Counter((*node.input, *[""] * 6)[place] for node in graph.node for place in weights.get(node.op_type, ()))
    assert uses.pop("") > 1, "no zero point is zero"
    assert len(uses) > 1
    assert set(uses.values()) == {1}


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
