"""From a specification to an engine that is loaded and warm. Runs where the engine runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from export.bundle import Bundle, BundleError, open_bundle
from model.tokenizer import Tokenizer
from server.batch.encoding_engine import EncodingEngine
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.encoding_runtime import EncodingRuntime
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings, amx_lies_idle
from server.engines.engine_spec import EngineSpec
from server.engines.self_test import self_test
from server.engines.stepper import Stepper
from server.requests import Decoding, GenerationRequest

log = logging.getLogger(__name__)


def build_engine(spec: EngineSpec) -> Stepper:
    """Checks the bundle again, for it may have changed, and builds its engine.

    Raises:
        BundleError: for a bundle that must not be used, or is no longer the one that was announced.
        RuntimeUnavailable: when the device or the graphs cannot be brought up, or compute something else than they should.
    """
    bundle = open_bundle(Path(spec.bundle))
    if bundle.fingerprint != spec.fingerprint:
        raise BundleError(f"{spec.bundle}: is not the bundle that the server was started with")
    engine = _build(bundle, spec, SessionSettings(device=spec.device, threads=spec.threads))
    difference = self_test(engine, bundle, spec.precision)
    log.info("computes what it was certified for", extra={"model": bundle.manifest.name, "difference": difference})
    if spec.device == "cpu" and spec.precision == "int8" and amx_lies_idle():
        log.warning(
            "int8 takes longer than it could: bound to one processor, and ONNX Runtime uses AMX only where there are two",
            extra={"model": bundle.manifest.name},
        )
    return engine


def _build(bundle: Bundle, spec: EngineSpec, settings: SessionSettings) -> Stepper:
    config, graphs, rows = bundle.manifest.model, bundle.root / spec.precision, spec.rows
    if config["family"] == "encoder_only":
        encoding = EncodingEngine(EncodingRuntime(graphs, settings, classes=config["classes"]), batch_rows=rows)
        return cast("Stepper", encoding)  # each engine takes its own kind of request, which the door sees to
    runtime = SequenceRuntime(graphs, SequenceShape.from_config(config), rows, settings, shortlist=bundle.shortlist())
    runtime.tune()
    tokenizer = Tokenizer.load(bundle.path("tokenizer.json"))
    engine = Engine(
        runtime,
        start_token=Tokenizer.BOS,
        end_token=Tokenizer.EOS,
        text_stream=tokenizer.stream,
        align=runtime.align if runtime.can_align else None,
    )
    engine.submit(
        GenerationRequest(id="warm-up", input_ids=(Tokenizer.EOS,), decoding=Decoding(max_tokens=1, beams=min(4, rows)))
    )
    while engine.has_work:
        engine.step()
    return cast("Stepper", engine)
