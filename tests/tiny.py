"""Tiny models with random weights, exported once a test run: real graphs, milliseconds a step."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from export.graphs import graph_modules
from export.trace import trace
from model.config import ModelConfig
from model.transformer import Transformer

SHAPES: dict[str, ModelConfig] = {
    "encoder_decoder": ModelConfig(
        family="encoder_decoder",
        vocab_size=40,
        d_model=32,
        heads=4,
        d_ff=64,
        encoder_layers=2,
        decoder_layers=2,
        max_source_length=24,
        max_target_length=24,
    ),
    "decoder_only": ModelConfig(
        family="decoder_only",
        vocab_size=40,
        d_model=32,
        heads=2,
        kv_heads=1,
        d_ff=64,
        decoder_layers=2,
        max_target_length=48,
        norm="pre",
        activation="gelu",
        positions="rotary",
        tied_embeddings="output",
        bias=False,
    ),
    "encoder_only": ModelConfig(
        family="encoder_only",
        vocab_size=40,
        d_model=32,
        heads=4,
        d_ff=64,
        encoder_layers=2,
        max_source_length=24,
        norm="pre",
        positions="learned",
        classes=3,
    ),
}


def shape(family: str, **changes: Any) -> ModelConfig:
    return replace(SHAPES[family], **changes)


@functools.cache
def model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random weights, spread so that distributions are neither flat nor certain and texts end after a while."""
    torch.manual_seed(seed)
    network = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in ("embedding", "target_embedding", "output"):
                parameter.mul_(3.0)
    return network


@functools.cache
def graphs(config: ModelConfig, seed: int = 0) -> Path:
    """The folder of the model's exported graphs."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-graphs-"))
    for name, module in graph_modules(model(config, seed)).items():
        trace(module, config, folder / f"{name}.onnx")
    return folder
