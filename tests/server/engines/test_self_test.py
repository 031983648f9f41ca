"""A machine that computes something else than the one that certified the bundle is noticed before it serves anybody."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from export import verify
from export.build import build_bundle
from export.bundle import BundleError, describe_files, graph_hashes, open_bundle
from server.device import session
from server.device.session import RuntimeUnavailable
from server.engines import build_engine as module
from server.engines.build_engine import build_engine
from server.engines.engine_spec import EngineSpec
from server.engines.self_test import self_test
from tests import tiny

FAMILIES = list(tiny.SHAPES)


def spec_of(bundle: Path, precision: str = "fp32") -> EngineSpec:
    fingerprint = open_bundle(bundle).fingerprint
    return EngineSpec(bundle=str(bundle), fingerprint=fingerprint, precision=precision, rows=4, device="cpu", threads=1)


def changed(bundle: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy whose fp32 folder was changed by whoever made the bundle: all hashes are right."""
    root = Path(shutil.copytree(bundle, folder / "bundle"))
    change(root / "fp32")
    path = root / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = describe_files(root)
    manifest["certificate"]["fp32"]["graphs"] = graph_hashes(manifest["files"], "fp32")
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return root


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(graphs: Path) -> None:
        path = graphs / "known_answers.json"
        known = json.loads(path.read_text(encoding="utf-8"))
        change(known)
        path.write_text(json.dumps(known), encoding="utf-8")

    return edit


@pytest.mark.parametrize("family", FAMILIES)
def test_the_machine_that_made_a_bundle_passes(bundles: dict[str, Path], family: str) -> None:
    bundle = open_bundle(bundles[family])
    engine = build_engine(spec_of(bundles[family]))
    assert self_test(engine, bundle, "fp32") < 1e-5
    assert not engine.has_work
    known = bundle.known_answers("fp32")
    assert sum(len(answer.values) for answer in known.answers) > 20  # it would not pass whatever it computed
    assert known.most_difference == 0.05


@pytest.fixture
def eight_bits(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for limits, least in (
        (verify.MAX_LOGIT_DIFFERENCE, 99.0),
        (verify.MAX_METRIC_LOSS, 99.0),
        (verify.MIN_IDENTICAL_TOKENS, 0.0),
    ):
        monkeypatch.setitem(limits, "int8", least)  # random weights lose more than trained ones
    run = bundles["encoder_decoder"].with_suffix(".run")
    build_bundle(run, tmp_path / "eight", name="eight", precisions=("int8", "fp32"))
    return tmp_path / "eight"


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "without VNNI"])
def test_eight_bits_are_the_same_whatever_the_processor(
    eight_bits: Path, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor without VNNI a bundle is served with unsigned weights, which any processor can do."""
    if elsewhere:
        monkeypatch.setattr(session, "session_config", lambda: {"session.x64quantprecision": "1"})
    engine = build_engine(spec_of(eight_bits, "int8"))
    assert self_test(engine, open_bundle(eight_bits), "int8") < 1e-5


def test_an_operator_is_told_where_eight_bits_lack_amx(
    eight_bits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "processor_features", lambda: [{"avx512_vnni", "amx_int8"}])
    for processors, precision, told in ({0, 1}, "int8", False), ({0}, "int8", True), ({0}, "fp32", False):
        caplog.clear()
        monkeypatch.setattr(session.os, "sched_getaffinity", lambda _, allowed=processors: allowed)
        build_engine(spec_of(eight_bits, precision))
        assert ("bound to one processor" in caplog.text) is told
    monkeypatch.setattr(session, "processor_features", lambda: [{"avx512_vnni"}])
    assert not session.amx_lies_idle()


def computes_otherwise(graphs: Path) -> None:
    """The largest matrix of the last graph is half as large: as if a kernel were wrong."""
    path = graphs / ("decode.onnx" if (graphs / "decode.onnx").exists() else "encode.onnx")
    program = onnx.load(path)
    largest = max(
        (i for i in program.graph.initializer if i.data_type == onnx.TensorProto.FLOAT), key=lambda i: math.prod(i.dims)
    )
    largest.CopyFrom(numpy_helper.from_array(0.5 * numpy_helper.to_array(largest), largest.name))
    onnx.save(program, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_machine_that_computes_something_else_is_noticed(bundles: dict[str, Path], tmp_path: Path, family: str) -> None:
    root = changed(bundles[family], tmp_path, computes_otherwise)
    with pytest.raises(RuntimeUnavailable) as caught:
        build_engine(spec_of(root))
    message = str(caught.value)
    assert message.startswith(f"{root}: fp32 computes something else here than where it was exported")
    assert "0.05 allowed" in message
    assert "\n" not in message


def test_what_is_no_number_is_noticed(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails, as it would later, and the test with it."""
    runtime = module.SequenceRuntime

    class Broken(runtime):  # type: ignore[valid-type, misc]
        def decode(self, *args: Any, **kwargs: Any) -> Any:
            ids, log_p = super().decode(*args, **kwargs)
            log_p[:] = float("nan")
            return ids, log_p

    monkeypatch.setattr(module, "SequenceRuntime", Broken)
    with pytest.raises(RuntimeUnavailable, match="differ by inf on average"):
        build_engine(spec_of(bundles["encoder_decoder"]))


def test_one_token_far_off_is_noticed(bundles: dict[str, Path], tmp_path: Path) -> None:
    def worse(known: dict[str, Any]) -> None:
        count = sum(len(answer["values"]) for answer in known["answers"])
        known["answers"][-1]["values"][-1] -= 0.051 * count

    with pytest.raises(RuntimeUnavailable, match=r"differ by 0\.051 on average"):
        build_engine(spec_of(changed(bundles["decoder_only"], tmp_path, edited(worse))))


def test_what_a_machine_may_differ_by_is_the_bundles_affair(bundles: dict[str, Path], tmp_path: Path) -> None:
    def lenient(known: dict[str, Any]) -> None:
        known["answers"][0]["values"][0] -= 1
        known["most_difference"] = 1.0

    build_engine(spec_of(changed(bundles["encoder_decoder"], tmp_path, edited(lenient))))


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no answers": lambda known: known["answers"].clear(),
    "no key": lambda known: known.pop("answers"),
    "no limit": lambda known: known.pop("most_difference"),
    "a limit of nothing": lambda known: known.update(most_difference=float("nan")),
    "no end of the limit": lambda known: known.update(most_difference=float("inf")),
    "another key": lambda known: known["answers"][0].update(more=1),
    "a token too large": lambda known: known["answers"][0]["output"].__setitem__(0, 10**6),
    "a token below zero": lambda known: known["answers"][0]["input"].__setitem__(0, -1),
    "a token that is true": lambda known: known["answers"][0]["input"].__setitem__(0, True),
    "a value too few": lambda known: known["answers"][0]["values"].pop(),
    "a value that is no number": lambda known: known["answers"][0]["values"].__setitem__(0, float("nan")),
    "a value in words": lambda known: known["answers"][0]["values"].__setitem__(0, "-0.5"),
    "an empty input": lambda known: known["answers"][0].update(input=[]),
    "an empty output": lambda known: known["answers"][0].update(output=[], values=[]),
    "an input in words": lambda known: known["answers"][0].update(input="abc"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(bundles: dict[str, Path], tmp_path: Path, damage: str) -> None:
    root = changed(bundles["encoder_decoder"], tmp_path, edited(DAMAGES[damage]))
    with pytest.raises(BundleError, match="known_answers.json: not known answers") as caught:
        build_engine(spec_of(root))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 10_000], ids=["nothing", "a list", "a number", "half", "deep"])
def test_what_is_no_such_file_is_refused(bundles: dict[str, Path], tmp_path: Path, content: str) -> None:
    root = changed(bundles["encoder_only"], tmp_path, lambda graphs: (graphs / "known_answers.json").write_text(content))
    with pytest.raises(BundleError, match="known_answers.json: not known answers"):
        build_engine(spec_of(root))


def test_a_bundle_without_known_answers_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    root = changed(bundles["encoder_decoder"], tmp_path, lambda graphs: (graphs / "known_answers.json").unlink())
    with pytest.raises(BundleError, match="no file 'fp32/known_answers.json' in the manifest"):
        build_engine(spec_of(root))
