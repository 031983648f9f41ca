"""The whole path with tiny models of random weights: bundle, engine, service, client."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from export.bundle import BundleError
from server.client import CallError, Generation, Options, Sampling, StreamedGeneration, StreamedText, TransformerClient
from server.config import Device, EngineOptions, EnginePlace, Precision, ServerOptions
from server.engines.engine_spec import EngineSpec
from server.engines.remote_engine import RemoteEngine
from server.loading import load_model
from server.metrics import Metrics
from server.server import Server
from tests import tiny

ENGINE = EngineOptions(device=Device.CPU, max_rows=8, threads=1, place=EnginePlace.IN_PROCESS)


@pytest.fixture
async def served(bundles: dict[str, Path]) -> AsyncIterator[Server]:
    """All three families in one server."""
    metrics = Metrics("test")
    models = [load_model(path, ENGINE, metrics.step_done) for path in bundles.values()]
    server = Server(models, ServerOptions(port=0, http_port=0, notice_seconds=0, drain_seconds=5), metrics)
    life = asyncio.create_task(server.serve())
    while not server.serving:
        await asyncio.sleep(0.01)
        if life.done():
            life.result()
    yield server
    server.ask_to_stop()
    await life


def client(server: Server, family: str) -> TransformerClient:
    return TransformerClient(f"127.0.0.1:{server.port}", model=family, timeout=20)


async def test_every_family_is_described(served: Server) -> None:
    async with client(served, "") as calls:
        models = {model.name: model for model in await calls.models()}
    assert list(models) == list(tiny.SHAPES)
    assert {model.device for model in models.values()} == {"cpu"}
    assert all(json.loads(model.parity_certificate)["passed"] for model in models.values())
    assert models["encoder_decoder"].limits.max_beams == 8
    assert models["encoder_decoder"].default_options.beams == 2
    assert models["encoder_only"].labels == ("bad", "fair", "good")


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize(
    "options",
    [Options(beams=1), Options(beams=4, hypotheses=4), Options(hypotheses=3, sampling=Sampling(seed=5, temperature=0.9))],
    ids=["greedy", "beam", "samples"],
)
async def test_generation_alone_together_and_streamed_is_the_same(served: Server, family: str, options: Options) -> None:
    texts = ["abc", "defgh", "a"]
    async with client(served, family) as calls:
        together = await calls.generate(texts, options, return_tokens=True)
        (alone,) = await calls.generate(texts[:1], options, return_tokens=True)
        events = [event async for event in calls.stream(texts, options, return_tokens=True)]
    assert_same(alone, together[0])
    streamed = {event.input: event.generation for event in events if isinstance(event, StreamedGeneration)}
    for position, result in enumerate(together):
        assert_same(streamed[position], result)
    for position, result in enumerate(together):
        for index, best in enumerate(result.hypotheses if options.sampling else result.hypotheses[:1]):
            pieces = [
                event
                for event in events
                if isinstance(event, StreamedText) and (event.input, event.hypothesis) == (position, index)
            ]
            assert "".join(piece.text for piece in pieces) == best.text
            assert [token.id for piece in pieces for token in piece.tokens] == [token.id for token in best.tokens]


def assert_same(one: Generation, other: Generation) -> None:
    """Identical tokens; log-probabilities may differ by what rounding the batch's size decides."""
    assert one.seed == other.seed
    for mine, yours in zip(one.hypotheses, other.hypotheses, strict=True):
        assert (mine.text, [token.id for token in mine.tokens]) == (yours.text, [token.id for token in yours.tokens])
        assert mine.log_probability == pytest.approx(yours.log_probability, abs=1e-4)


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder_only"])
async def test_scoring_an_output_gives_its_own_log_probability(served: Server, family: str) -> None:
    async with client(served, family) as calls:
        (result,) = await calls.generate(["abcd"], Options(beams=1, max_tokens=6), return_tokens=True)
        best = result.hypotheses[0]
        (score,) = await calls.score([("abcd", [token.id for token in best.tokens])], return_tokens=True)
    assert score.log_probability == pytest.approx(best.log_probability, abs=1e-4)
    assert [token.id for token in score.tokens] == [token.id for token in best.tokens]


async def test_a_target_prefix_begins_every_hypothesis(served: Server) -> None:
    async with client(served, "encoder_decoder") as calls:
        (result,) = await calls.generate(["abc"], Options(beams=3, hypotheses=3), target_prefix="de")
    assert all(hypothesis.text.startswith("de") for hypothesis in result.hypotheses)


async def test_classes_and_vectors(served: Server) -> None:
    async with client(served, "encoder_only") as calls:
        for classified in await calls.classify(["abc", "defgh"]):
            assert sum(c.probability for c in classified.classes) == pytest.approx(1, abs=1e-5)
            assert sorted(c.label for c in classified.classes) == ["bad", "fair", "good"]
        (vector,) = await calls.embed(["abc"], normalize=True)
        assert sum(value**2 for value in vector.vector) == pytest.approx(1, abs=1e-5)
        with pytest.raises(CallError, match="^FAILED_PRECONDITION: "):
            await calls.generate(["abc"])


def test_a_missing_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such directory"):
        load_model(tmp_path / "none", ENGINE, Metrics("test").step_done)


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("limits",), {}, "KeyError: 'max_input_tokens'"),
        (("task", "labels"), ["bad", "good"], "2 labels for 3 classes"),
        (("model", "vocab_size"), 7, "the model only 7"),
        (("generation", "beam"), 2, "unexpected keyword argument 'beam'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_in_one_line(
    bundles: dict[str, Path], tmp_path: Path, where: tuple[str, ...], value: object, complaint: str
) -> None:
    copy = shutil.copytree(bundles["encoder_only"], tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    place = manifest
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=re.escape(complaint)) as refused:
        load_model(copy, ENGINE, Metrics("test").step_done)
    assert str(refused.value).startswith(f"{copy}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("quota", "engines", "threads", "rows"),
    [("800000 100000\n", 7, 1, 32), ("150000 100000\n", 1, 1, 64), ("max 100000\n", 15, 1, 32), (None, 15, 1, 32)],
)
def test_engines_fill_the_cores_that_a_container_may_use(
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quota: str | None,
    engines: int,
    threads: int,
    rows: int,
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    made: list[EngineSpec] = []

    class Seen(RemoteEngine):
        def __init__(self, name: str, spec: EngineSpec, *others: Any) -> None:
            super().__init__(name, spec, *others)
            made.append(spec)

    monkeypatch.setattr("server.loading._CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr("server.loading.RemoteEngine", Seen)
    load_model(bundles["encoder_decoder"], EngineOptions(device=Device.CPU), lambda name, stats: None)
    assert [(spec.threads, spec.rows) for spec in made] == [(threads, rows)] * engines


def test_engines_share_rows_and_memory(bundles: dict[str, Path]) -> None:
    def rows(**options: Any) -> int:
        engine = EngineOptions(device=Device.CPU, precision=Precision.FP32, **options)
        return load_model(bundles["encoder_decoder"], engine, lambda name, stats: None).limits.max_beams

    assert rows(engines=1, max_rows=10) == 10
    assert rows(engines=3, max_rows=10) == 4
    one = rows(engines=1, cache_memory=200_000)
    assert rows(engines=2, cache_memory=400_000) == one
    assert rows(engines=2, cache_memory=200_000) < one
