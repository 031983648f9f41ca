"""The graph that finds where the decoder looked, against the trained model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from export.build import ExportError, build_bundle
from export.bundle import open_bundle
from export.graph_runner import SequenceGraphs
from model.alignment import alignment_weights
from model.config import ModelConfig
from tests import tiny

NAMES = [name for name, config in tiny.VARIANTS.items() if config.family == "encoder_decoder"]


def some_outputs(config: ModelConfig) -> tuple[list[int], list[list[int]]]:
    rng = random.Random(0)
    lengths = (5, 1, config.max_target_length, 12)
    return tiny.token_ids(rng, 17), [tiny.token_ids(rng, length) for length in lengths]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_pytorchs(name: str) -> None:
    config = tiny.VARIANTS[name]
    graphs = SequenceGraphs(tiny.graphs_with_alignment(config), config)
    source, outputs = some_outputs(config)
    for weights, output in zip(graphs.align(source, outputs), outputs, strict=True):
        wanted = alignment_weights(tiny.model(config), source, output).numpy()
        assert wanted.shape == (len(output), len(source))
        np.testing.assert_allclose(weights, wanted, atol=1e-5)
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-5)
    assert graphs.align(source[:1], outputs[:1])[0].tolist() == [[1.0]] * 5


def test_eight_bits_come_close() -> None:
    config = tiny.shape("encoder_decoder")
    graphs = SequenceGraphs(tiny.graphs_with_alignment(config, "int8"), config)
    source, outputs = some_outputs(config)
    for weights, output in zip(graphs.align(source, outputs), outputs, strict=True):
        wanted = alignment_weights(tiny.model(config), source, output).numpy()
        assert 0 < np.abs(weights - wanted).max() < 0.2
        assert (weights.argmax(1) == wanted.argmax(1)).mean() > 0.7


def test_a_certificate_compares_attention(bundles: dict[str, Path], tmp_path: Path) -> None:
    run = bundles["encoder_decoder"].with_suffix(".run")
    (certificate,) = build_bundle(run, tmp_path / "bundle", name="looks", alignment=True)
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert "fp32/align.onnx" in manifest.files
    assert manifest.certificate["fp32"]["alignment"] == certificate.alignment
    assert 0 < certificate.alignment["max_weight_difference"] < 1e-4
    assert certificate.alignment["identical_positions"] > 0.99
    certificate.alignment["max_weight_difference"] = 0.01
    assert certificate.failures == ["attention differs by 0.01"]


def test_a_language_model_has_no_alignments(bundles: dict[str, Path], tmp_path: Path) -> None:
    run = bundles["decoder_only"].with_suffix(".run")
    with pytest.raises(ExportError, match="only an encoder-decoder has alignments, not a decoder_only model"):
        build_bundle(run, tmp_path / "bundle", name="looks", alignment=True)
