"""From a bundle on disk to a model that can be served: check the files, then say what engines it needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from export.bundle import CACHE_TYPES, Bundle, BundleError, open_bundle
from model.tokenizer import Tokenizer, TokenizerError
from server.batch.sequence_model import SequenceShape
from server.batch.step_stats import StepStats
from server.config import EngineOptions, EnginePlace, Precision
from server.device.caches import CacheLayout
from server.device.session import RuntimeUnavailable, choose_device
from server.engines.build_engine import build_engine
from server.engines.engine_client import EngineClient, Loss
from server.engines.engine_pool import EnginePool
from server.engines.engine_spec import EngineSpec
from server.engines.in_process import InProcessEngine
from server.engines.kept_process import Supervision
from server.engines.remote_engine import RemoteEngine
from server.models import ServedModel
from server.requests import GenerationDefaults, Limits

_ROWS = {"cpu": 64, "cuda": 256}
"""Rows of the running batch where none are asked for: beyond these, more rows only make each step longer."""
_ROWS_OF_SEVERAL = 32
"""Of each engine, where there are several: memory grows with all of them."""
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_PRECISIONS = {"cpu": ("int8", "fp32"), "cuda": ("fp16", "fp32")}
"""What runs on each device, the fastest first."""


def load_model(
    path: Path,
    options: EngineOptions,
    on_step: Callable[[str, StepStats], None],
    on_loss: Callable[[str, Loss], None] = lambda name, loss: None,
) -> ServedModel:
    """Checks a bundle and describes it; its engines are built and warmed by ``engine.start()``.

    Args:
        on_step: told the model's name and what each step of its engines did.
        on_loss: told the model's name whenever one of its engine processes was lost.

    Raises:
        BundleError: for a bundle that must not be used.
        RuntimeUnavailable: when the device is not there.
    """

    def make_engine(name: str, spec: EngineSpec, count: int) -> EngineClient:
        return _make_engine(name, spec, count, options, partial(on_step, name), partial(on_loss, name))

    return describe_model(path, options, make_engine)


def describe_model(
    path: Path, options: EngineOptions, make_engine: Callable[[str, EngineSpec, int], EngineClient]
) -> ServedModel:
    """As ``load_model``, with engines made by ``make_engine``: of the model's name, what to build, and how many."""
    bundle = open_bundle(path)
    device = choose_device(options.device)
    try:
        return _describe(bundle, device, options, make_engine)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: the manifest does not describe a model ({type(error).__name__}: {error})") from error


def _describe(
    bundle: Bundle,
    device: str,
    options: EngineOptions,
    make_engine: Callable[[str, EngineSpec, int], EngineClient],
) -> ServedModel:
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
    engines = _choose_engines(device, options)
    spec = EngineSpec(
        bundle=str(bundle.root.absolute()),
        fingerprint=bundle.fingerprint,
        precision=precision,
        rows=_choose_rows(bundle, device, precision, options, engines),
        device=device,
        threads=options.threads or (1 if engines > 1 else _usual_threads()),
    )
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
        limits=replace(limits, max_beams=min(limits.max_beams, spec.rows)),
        defaults=replace(defaults, beams=min(defaults.beams, spec.rows)),
        labels=labels,
        certificate=json.dumps(manifest.certificate[precision], ensure_ascii=False),
        vocab_size=manifest.model["vocab_size"],
        can_align=f"{precision}/align.onnx" in manifest.files,
        shortlist=None if (shortlist := bundle.shortlist()) is None else frozenset(shortlist),
        tokenizer=tokenizer,
        engine=make_engine(manifest.name, spec, engines),
    )


def _make_engine(
    name: str,
    spec: EngineSpec,
    count: int,
    options: EngineOptions,
    on_step: Callable[[StepStats], None],
    on_loss: Callable[[Loss], None],
) -> EngineClient:
    if options.place is EnginePlace.IN_PROCESS:
        return InProcessEngine(name, partial(build_engine, spec), on_step)
    supervision = Supervision(stall_seconds=options.stall_seconds)
    engines = [RemoteEngine(name, spec, on_step, on_loss, supervision) for _ in range(count)]
    return engines[0] if count == 1 else EnginePool(engines)


def _choose_engines(device: str, options: EngineOptions) -> int:
    if options.engines is not None:
        return options.engines
    if options.place is EnginePlace.IN_PROCESS or device != "cpu":
        return 1
    return max(1, _usual_threads() // (options.threads or 1))


def _usual_threads() -> int:
    """One core stays free for the service: on two cores, a second thread in ONNX Runtime halves what is served."""
    return max(1, _cores() - 1)


def _cores() -> int:
    """Cores that this process may use: a container sees all of its node's, and is held to a quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores


def _choose_rows(bundle: Bundle, device: str, precision: str, options: EngineOptions, engines: int) -> int:
    """Of one engine: its share of as many as were asked for, or fit into the memory that was given.

    Raises:
        RuntimeUnavailable: when not even one fits.
    """
    usual = _ROWS_OF_SEVERAL if engines > 1 else _ROWS[device]
    rows, config = -(-options.max_rows // engines) if options.max_rows else usual, bundle.manifest.model
    if options.cache_memory is None or config["family"] == "encoder_only":
        return rows
    shape = SequenceShape.from_config(config)
    one, two = (sum(CacheLayout.of(shape, count, CACHE_TYPES[precision]).sizes) for count in (1, 2))
    if (share := options.cache_memory // engines) < one:
        each = f" for each of {engines} engines" if engines > 1 else ""
        raise RuntimeUnavailable(
            f"{bundle.root}: --cache-memory of {options.cache_memory:,} bytes is less than the {one * engines:,} that one row"
            f" takes{each}"
        )
    return min(rows, 1 + (share - one) // (two - one))


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
