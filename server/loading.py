"""From a bundle on disk to a model that can be served: check the files, then build the engine that its family needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from export.bundle import Bundle, BundleError, open_bundle
from model.tokenizer import Tokenizer, TokenizerError
from server.caches import CacheLayout, CacheTypes
from server.config import EngineOptions, Precision
from server.encoding_engine import EncodingEngine
from server.engine import Engine
from server.in_process import InProcessEngine, Stepper
from server.models import ServedModel
from server.requests import Decoding, EncodingRequest, GenerationDefaults, GenerationRequest, Limits
from server.runtime import EncodingRuntime, RuntimeUnavailable, SequenceRuntime, SessionSettings, choose_device
from server.sequence_model import SequenceShape
from server.step_stats import StepStats

_ROWS = {"cpu": 64, "cuda": 256}
"""Rows of the running batch where none are asked for: beyond these, more rows only make each step longer."""
_PRECISIONS = {"cpu": ("int8", "fp32"), "cuda": ("fp16", "fp32")}
"""What runs on each device, the fastest first."""


def load_model(path: Path, options: EngineOptions, on_step: Callable[[str, StepStats], None]) -> ServedModel:
    """Checks a bundle and describes it; its engine is built and warmed by ``engine.start()``.

    Args:
        on_step: told the model's name and what each of its engine's steps did.

    Raises:
        BundleError: for a bundle that must not be used.
        RuntimeUnavailable: when the device is not there.
    """
    bundle = open_bundle(path)
    device = choose_device(options.device)
    try:
        return _describe(bundle, device, options, on_step)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: the manifest does not describe a model ({type(error).__name__}: {error})") from error


def _describe(bundle: Bundle, device: str, options: EngineOptions, on_step: Callable[[str, StepStats], None]) -> ServedModel:
    manifest = bundle.manifest
    precision = _choose_precision(bundle, device, options.precision)
    try:
        tokenizer = Tokenizer.load(bundle.path("tokenizer.json"))
    except TokenizerError as error:
        raise BundleError(str(error)) from error
    labels = tuple(manifest.task.get("labels") or ())
    if len(labels) != manifest.model["classes"]:
        raise BundleError(f"{bundle.root}: {len(labels)} labels for {manifest.model['classes']} classes")
    if tokenizer.vocab_size > manifest.model["vocab_size"]:
        raise BundleError(
            f"{bundle.root}: the tokenizer has {tokenizer.vocab_size} ids, the model only {manifest.model['vocab_size']}"
        )
    rows = _choose_rows(bundle, device, precision, options)
    settings = SessionSettings(device=device, threads=options.threads or _usual_threads())
    build = partial(_build_engine, bundle, precision, rows, settings, tokenizer)
    limits = Limits(
        max_input_tokens=manifest.limits["max_input_tokens"], max_output_tokens=manifest.limits["max_output_tokens"]
    )
    defaults = GenerationDefaults(**manifest.generation)
    return ServedModel(
        name=manifest.name,
        family=manifest.model["family"],
        task=manifest.task["name"],
        precision=precision,
        device=device,
        fingerprint=bundle.fingerprint,
        parameters=manifest.parameters,
        limits=replace(limits, max_beams=min(limits.max_beams, rows)),
        defaults=replace(defaults, beams=min(defaults.beams, rows)),
        labels=labels,
        certificate=json.dumps(manifest.certificate[precision], ensure_ascii=False),
        vocab_size=manifest.model["vocab_size"],
        tokenizer=tokenizer,
        engine=InProcessEngine(manifest.name, build, partial(on_step, manifest.name)),
    )


def _usual_threads() -> int:
    """One core stays free for the service: on two cores, a second thread in ONNX Runtime halves what is served."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _choose_rows(bundle: Bundle, device: str, precision: str, options: EngineOptions) -> int:
    """As many as were asked for, or fit into the memory that was given.

    Raises:
        RuntimeUnavailable: when not even one fits.
    """
    rows, config = options.max_rows or _ROWS[device], bundle.manifest.model
    if options.cache_memory is None or config["family"] == "encoder_only":
        return rows
    shape = SequenceShape.from_config(config)
    types = CacheTypes(**bundle.manifest.caches[precision])
    one, two = (sum(CacheLayout.of(shape, count, types).sizes) for count in (1, 2))
    if options.cache_memory < one:
        raise RuntimeUnavailable(
            f"{bundle.root}: --cache-memory of {options.cache_memory:,} bytes is less than the {one:,} that one row takes"
        )
    return min(rows, 1 + (options.cache_memory - one) // (two - one))


def _choose_precision(bundle: Bundle, device: str, asked: Precision) -> str:
    """Raises BundleError when the bundle has no graphs of that precision for the device."""
    usable = [p for p in _PRECISIONS[device] if p in bundle.manifest.precisions]
    if asked is Precision.AUTO and usable:
        return usable[0]
    if asked in usable:
        return asked
    has = ", ".join(bundle.manifest.precisions)
    raise BundleError(
        f"{bundle.root}: has graphs in {has}; {device} runs {' or '.join(_PRECISIONS[device])}, {asked} was asked for"
    )


def _build_engine(bundle: Bundle, precision: str, rows: int, settings: SessionSettings, tokenizer: Tokenizer) -> Stepper:
    """Loaded and warm. Raises RuntimeUnavailable."""
    config, graphs = bundle.manifest.model, bundle.root / precision
    if config["family"] == "encoder_only":
        encoding = EncodingEngine(EncodingRuntime(graphs, settings, classes=config["classes"]), batch_rows=rows)
        encoding.submit(EncodingRequest(id="warm-up", input_ids=(Tokenizer.EOS,)))
        encoding.step()
        return cast("Stepper", encoding)  # each engine takes its own kind of request, which the door sees to
    runtime = SequenceRuntime(graphs, SequenceShape.from_config(config), rows, settings)
    runtime.tune()
    engine = Engine(runtime, start_token=Tokenizer.BOS, end_token=Tokenizer.EOS, text_stream=tokenizer.stream)
    for beams in (1, min(4, rows)):
        engine.submit(GenerationRequest(id="warm-up", input_ids=(Tokenizer.EOS,), decoding=Decoding(max_tokens=1, beams=beams)))
        while engine.has_work:
            engine.step()
    return cast("Stepper", engine)
