"""The real server in this process, on free ports, with fake engines behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from model.tokenizer import Tokenizer
from protos import transformer_pb2_grpc
from server.config import ServerOptions
from server.metrics import Metrics
from server.models import ServedModel
from server.requests import GenerationDefaults, Limits
from server.server import Server
from tests.server.fake_engine import FakeEngine

TOKENIZER = Tokenizer.train_characters(["abcdefghijklmnopqrstuvwxyz 0123456789-. äé€😀"])


def served_model(engine: FakeEngine, **changes: Any) -> ServedModel:
    facts: dict[str, Any] = {
        "name": "dates",
        "family": "encoder_decoder",
        "task": "dates",
        "precision": "fp32",
        "device": "cpu",
        "fingerprint": "f" * 64,
        "parameters": 1234,
        "limits": Limits(max_inputs=8, max_text_bytes=200, max_input_tokens=40, max_output_tokens=50, max_beams=4),
        "defaults": GenerationDefaults(beams=1, length_penalty=1.0, max_tokens=50),
        "labels": (),
        "certificate": '{"passed": true}',
        "vocab_size": TOKENIZER.vocab_size,
        "tokenizer": TOKENIZER,
        "engine": engine,
    }
    return ServedModel(**{**facts, **changes})


def encoder(engine: FakeEngine, **changes: Any) -> ServedModel:
    facts = {"name": "mood", "family": "encoder_only", "task": "mood", "labels": ("bad", "good")}
    return served_model(engine, **{**facts, **changes})


@dataclass(frozen=True)
class Running:
    server: Server
    metrics: Metrics
    channel: grpc.aio.Channel
    stub: transformer_pb2_grpc.TransformerStub
    life: asyncio.Task[None]
    """``server.serve()``."""

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def value(self, name: str, **labels: str) -> float | None:
        """A metric's value; None before its first."""
        return self.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def run_server(*models: ServedModel, warm: bool = True, **options: Any) -> AsyncIterator[Running]:
    """Args: warm: wait until it serves; options: of ServerOptions."""
    quick = {"port": 0, "http_port": 0, "notice_seconds": 0.0, "drain_seconds": 5.0}
    metrics = Metrics("test")
    server = Server(models, ServerOptions(**{**quick, **options}), metrics)
    life = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not (server.serving if warm else server.port):
            if life.done():
                life.result()
            await asyncio.sleep(0.005)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Running(server, metrics, channel, transformer_pb2_grpc.TransformerStub(channel), life)
    finally:
        if not life.done():
            server.ask_to_stop()
        await life
