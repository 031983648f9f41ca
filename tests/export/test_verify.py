"""The parity certificate passes what is right and fails what is wrong, however little is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import verify as module
from export.graph_runner import Array, ClassifyGraphs, SequenceGraphs
from export.verify import Certificate, verify
from model.checkpoint import Run
from tests import tiny

FAMILIES = list(tiny.SHAPES)
STAGES = {
    "encoder_decoder": ["pytorch incremental", "onnx fp32", "onnx fp32 beside ragged neighbours"],
    "decoder_only": [
        "pytorch incremental",
        "onnx fp32",
        "onnx fp32 beside ragged neighbours",
        "onnx fp32 with chunked prefill",
    ],
    "encoder_only": ["onnx fp32", "onnx fp32 beside ragged neighbours"],
}


def run_of(family: str) -> Run:
    return tiny.run(tiny.shape(family), examples=6)


def certify(family: str) -> Certificate:
    run = run_of(family)
    return verify(run, tiny.graphs(run.config), "fp32")[0]


def failing_stages(certificate: Certificate) -> set[str]:
    return {failure.split(":")[0] for failure in certificate.failures}


@pytest.mark.parametrize("family", FAMILIES)
def test_faithful_graphs_pass_every_stage(family: str) -> None:
    certificate = certify(family).to_dict()
    assert certificate["passed"] is True
    assert certificate["failures"] == []
    assert [stage["stage"] for stage in certificate["stages"]] == STAGES[family]
    for stage in certificate["stages"]:
        assert 0 < stage["max_logit_difference"] <= 1e-4 or stage["stage"].endswith(("neighbours", "prefill"))
        assert stage["identical_tokens"] == 1.0
        assert stage["positions"] >= 6
    metric = certificate["metric"]
    assert metric["pytorch"] == pytest.approx(metric["onnx"], abs=1e-4)
    assert metric["inputs"] == 6


def weights(path: Path) -> list[str]:
    """Names of the initializers that hold learned numbers."""
    return [
        tensor.name
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_defect_in_any_weight_is_found(family: str, tmp_path: Path) -> None:
    run = run_of(family)
    example = {"source": "a7cxq", "target": "k2f", "label": "good"}
    run = replace(run, held_out=[example], generation=run.generation | {"max_tokens": 2})
    sound = tiny.graphs(run.config)
    for path in sound.iterdir():
        graph_names = weights(path)
        assert len(graph_names) >= 10
        for name in graph_names:
            graph = onnx.load(path)
            (tensor,) = (t for t in graph.graph.initializer if t.name == name)
            damaged = numpy_helper.to_array(tensor) * np.float32(1.05)
            tensor.CopyFrom(numpy_helper.from_array(damaged, name))
            for other in sound.iterdir():
                (tmp_path / other.name).write_bytes(other.read_bytes())
            onnx.save(graph, tmp_path / path.name)
            certificate, _ = verify(run, tmp_path, "fp32")
            assert "onnx fp32" in failing_stages(certificate), f"{path.name} {name}"
            assert certificate.to_dict()["passed"] is False


def test_a_wrong_position_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(SequenceGraphs):
        def step(self, tokens: Array, positions: Array) -> tuple[Array, Array]:
            return super().step(tokens, np.minimum(positions + 1, self.config.max_target_length - 1))

    monkeypatch.setattr(module, "SequenceGraphs", Shifted)
    for family in ("encoder_decoder", "decoder_only"):
        assert "onnx fp32" in failing_stages(certify(family))


def test_a_neighbour_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaking(SequenceGraphs):
        def start(self, inputs, chunk=None) -> None:
            super().start(inputs, chunk)
            if self.encoder is not None:
                self.source_last[:] = self.source_last.max()  # as if every source were as long as the longest

    monkeypatch.setattr(module, "SequenceGraphs", Leaking)
    assert failing_stages(certify("encoder_decoder")) >= {"onnx fp32 beside ragged neighbours"}
    assert "onnx fp32" not in failing_stages(certify("encoder_decoder"))

    class LeakingClassifier(ClassifyGraphs):
        def run(self, inputs) -> Array:
            longest = max(map(len, inputs))
            return super().run([[*ids, *[0] * (longest - len(ids))] for ids in inputs])

    monkeypatch.setattr(module, "ClassifyGraphs", LeakingClassifier)
    assert failing_stages(certify("encoder_only")) == {"onnx fp32 beside ragged neighbours"}


def test_a_chunk_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(SequenceGraphs):
        def start(self, inputs, chunk=None) -> None:
            super().start(inputs, chunk)
            if chunk:
                self.self_caches[:, :, :, chunk : 2 * chunk] = 0

    monkeypatch.setattr(module, "SequenceGraphs", Forgetful)
    assert failing_stages(certify("decoder_only")) == {"onnx fp32 with chunked prefill"}


def logits(*values: float) -> list[np.ndarray]:
    """One example of one position for each value, which is the logit of the second of two tokens."""
    return [np.array([[0.0, value]], np.float32) for value in values]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.001])
def test_one_bad_logit_anywhere_fails(at: int, value: float) -> None:
    found = logits(1.0, 1.0, 1.0)
    found[at][0, 1] = value
    certificate = Certificate("fp32", 3)
    certificate.compare("a", "b", found, logits(1.0, 1.0, 1.0))
    assert len(certificate.failures) == 1


def test_what_is_not_a_number_on_both_sides_fails() -> None:
    certificate = Certificate("fp32", 2)
    certificate.compare("a", "b", logits(1.0, np.nan), logits(1.0, np.nan))
    assert certificate.failures


def test_another_best_token_fails_however_close_the_logits() -> None:
    certificate = Certificate("fp32", 2)
    certificate.compare("a", "b", logits(1e-6, 1.0), logits(-1e-6, 1.0))
    assert certificate.failures == ["a: 50.0000% of tokens are the same, less than 99.9%"]


@pytest.mark.parametrize(("loss", "fails"), [(0.05, False), (0.2, True), (float("nan"), True), (-3.0, False)])
def test_a_worse_metric_fails(loss: float, fails: bool) -> None:
    certificate = Certificate("fp32", 1, metric={"name": "bleu", "pytorch": 30.0, "onnx": 30.0 - loss, "loss": loss})
    certificate.compare("a", "b", logits(1.0), logits(1.0))
    assert bool(certificate.failures) == fails


def test_nothing_compared_fails() -> None:
    run = run_of("decoder_only")
    certificate, _ = verify(replace(run, held_out=[{"source": "", "target": "abc"}]), tiny.graphs(run.config), "fp32")
    assert certificate.failures == ["nothing was compared"]
