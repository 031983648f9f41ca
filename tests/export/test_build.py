"""A run becomes a bundle, whole and verified, or nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import nn
from typer.testing import CliRunner

from export import build as module
from export.__main__ import app
from export.build import ExportError, build_bundle
from export.bundle import BundleError, open_bundle
from export.graph_runner import ClassifyGraphs, SequenceGraphs
from model.checkpoint import RunError
from model.config import ModelConfig
from model.decode import greedy
from tests import tiny

FAMILIES = list(tiny.SHAPES)


@pytest.fixture
def run(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(bundles["decoder_only"].with_suffix(".run"), tmp_path / "run"))


@pytest.fixture
def traced_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's weights are those of ``tiny.model``, so their graphs need no tracing again."""

    def copy(graph: nn.Module, config: ModelConfig, path: Path, *_: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny.graphs(config) / path.name, path)

    monkeypatch.setattr(module, "trace", copy)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_becomes_a_bundle(bundles: dict[str, Path], family: str) -> None:
    bundle = open_bundle(bundles[family])
    manifest, config = bundle.manifest, tiny.shape(family)
    graphs = ["decode"] if family == "decoder_only" else ["encode"] if family == "encoder_only" else ["decode", "encode"]
    assert sorted(manifest.files) == [*(f"fp32/{graph}.onnx" for graph in graphs), "fp32/known_answers.json", "tokenizer.json"]
    assert (manifest.name, manifest.precisions) == (family, ["fp32"])
    assert ModelConfig.from_dict(manifest.model) == config
    assert manifest.parameters == sum(p.numel() for p in tiny.model(config).parameters())
    assert manifest.task["name"] == "tiny"
    assert manifest.generation == {"beams": 2, "length_penalty": 1.0, "max_tokens": 16}
    assert manifest.provenance["seed"] == 0
    assert manifest.provenance["weights"] == "best.safetensors"
    longest = {"encoder_decoder": (24, 24), "decoder_only": (47, 48), "encoder_only": (24, 0)}[family]
    assert manifest.limits == {"max_input_tokens": longest[0], "max_output_tokens": longest[1]}
    assert manifest.certificate["fp32"]["passed"] is True
    assert len(manifest.certificate["fp32"]["stages"]) >= 2
    assert tiny.TOKENIZER.encode_text("dates") == type(tiny.TOKENIZER).load(bundle.path("tokenizer.json")).encode_text("dates")

    inputs = [[5, 6, 7, 30, 31], [9, 8]]
    if family == "encoder_only":
        assert ClassifyGraphs(bundle.root / "fp32", config).run(inputs).shape == (2, 3 + 32)
    else:
        found = SequenceGraphs(bundle.root / "fp32", config).greedy(inputs, 12)
        assert found == [greedy(tiny.model(config), ids, 12).text_tokens for ids in inputs]


@pytest.mark.usefixtures("traced_before")
def test_nothing_is_replaced_without_force(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    reports: list[str] = []
    (certificate,) = build_bundle(run, target, name="first", report=reports.append)
    assert reports
    assert open_bundle(target).manifest.certificate["fp32"]["stages"] == certificate.stages
    before = open_bundle(target).fingerprint
    with pytest.raises(BundleError, match=r"exists already \(--force replaces it\)"):
        build_bundle(run, target, name="second")
    assert open_bundle(target).fingerprint == before
    build_bundle(run, target, name="second", force=True)
    assert open_bundle(target).manifest.name == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "run"]


def test_a_crash_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced_before: None) -> None:
    target = tmp_path / "bundle"
    build_bundle(run, target, name="first")
    before = open_bundle(target).fingerprint
    trace = module.trace

    def crash(graph: nn.Module, config: ModelConfig, path: Path, *rest: object) -> None:
        trace(graph, config, path, *rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "trace", crash)
    for place, force in ((target, True), (tmp_path / "other", False)):
        with pytest.raises(OSError, match="No space left"):
            build_bundle(run, place, name="second", force=force)
    assert open_bundle(target).fingerprint == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "run"]


def test_graphs_that_differ_become_no_bundle(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(graph: nn.Module, config: ModelConfig, path: Path, *_: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = onnx.load(tiny.graphs(config) / path.name)
        tensor = next(t for t in whole.graph.initializer if t.name.startswith("output"))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
        onnx.save(whole, path)

    monkeypatch.setattr(module, "trace", damaged)
    with pytest.raises(ExportError, match="the fp32 graphs do not do what PyTorch does: onnx fp32: logits differ by") as caught:
        build_bundle(run, tmp_path / "bundle", name="tiny")
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("traced_before")
def test_a_shape_that_cannot_be_served_is_refused_first(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", tiny.shape("encoder_only", heads=8))
    with pytest.raises(ExportError, match="head width .* must be a multiple of 8"):
        build_bundle(run, tmp_path / "bundle", name="tiny")


def change_record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        record = json.loads((run / "run.json").read_text())
        change(record)
        (run / "run.json").write_text(json.dumps(record))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a run": (lambda run: (run / "run.json").unlink(), "run.json: No such file"),
    "too deep": (write("run.json", b"[" * 100_000), "run.json: not JSON"),
    "a task of another type": (change_record(lambda r: r.update(task=[])), "run.json: task must be a section"),
    "no metric": (change_record(lambda r: r["task"].pop("metric")), "task.metric is missing"),
    "an unknown metric": (change_record(lambda r: r["task"].update(metric="taste")), "task.metric must be one of"),
    "a metric of another kind": (change_record(lambda r: r["task"].update(metric="bleu")), "task.metric of language_model"),
    "a width in words": (change_record(lambda r: r["model"].update(d_model="wide")), "d_model must be a whole number"),
    "no length": (change_record(lambda r: r["generation"].update(max_tokens=0)), "max_tokens must be at least 1"),
    "provenance as a list": (change_record(lambda r: r.update(provenance=[])), "provenance must be a section"),
    "no examples": (write("held_out.jsonl", b""), "no examples to compare the graphs with"),
    "an example that is a number": (write("held_out.jsonl", b"7\n"), "held_out.jsonl: example 1 must have source and target"),
    "an example without a target": (write("held_out.jsonl", b'{"source": "a"}\n'), "example 1 must have source and target"),
    "an example of numbers": (write("held_out.jsonl", b'{"source": 1, "target": 2}\n'), "example 1 must have source"),
    "examples without tokens": (write("held_out.jsonl", b'{"source": "", "target": ""}\n'), "nothing was compared"),
    "weights of another model": (
        lambda run: shutil.copyfile(run.parent / "other" / "best.safetensors", run / "best.safetensors"),
        r"is missing.*\(and \d+ more\)",
    ),
}


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_with_one_line(run: Path, tmp_path: Path, bundles: dict[str, Path], damage: str) -> None:
    shutil.copytree(bundles["encoder_only"].with_suffix(".run"), tmp_path / "other")
    do, problem = DAMAGES[damage]
    do(run)
    with pytest.raises((RunError, ExportError), match=problem) as caught:
        build_bundle(run, tmp_path / "bundle", name="tiny")
    assert str(run) in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "bundle").exists()


# The command


@pytest.mark.usefixtures("traced_before")
def test_the_command_shows_the_certificate(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(run), str(tmp_path / "bundle")])
    assert result.exit_code == 0, result.output
    assert "Parity certificate, fp32, 12 inputs" in result.output
    assert open_bundle(tmp_path / "bundle").manifest.name == "bundle"
    again = CliRunner().invoke(app, [str(run), str(tmp_path / "bundle")])
    assert (again.exit_code, again.stderr) == (2, f"error: {tmp_path}/bundle: exists already (--force replaces it)\n")


@pytest.mark.usefixtures("traced_before")
def test_a_place_that_cannot_be_written_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, [str(run), str(tmp_path / "file" / "bundle")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: ")


def test_the_command_refuses_a_damaged_run_without_a_traceback(run: Path, tmp_path: Path) -> None:
    weights = run / "best.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    command = [sys.executable, "-m", "export", str(run), str(tmp_path / "bundle")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {weights}: damaged")
    assert not (tmp_path / "bundle").exists()


def test_the_command_rejects_unknown_flags_by_name(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(run), str(tmp_path / "bundle"), "--forse"])
    assert result.exit_code == 2
    assert "--forse" in result.stderr
