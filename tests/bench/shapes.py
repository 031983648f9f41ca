"""The two shapes that are measured, with random weights: speed does not depend on what a model has learnt.

Texts end when they have their fixed length, so that every side does the same work.
"""

from __future__ import annotations

import copy
import platform
from pathlib import Path

import torch

from export.graphs import graph_modules
from export.quantize import observe, quantize
from export.trace import trace
from model.config import ModelConfig
from model.transformer import Transformer

BUILD = Path("build/bench")

SHAPES = {
    "base": ModelConfig(
        family="encoder_decoder",
        vocab_size=32_000,
        d_model=512,
        heads=8,
        d_ff=2048,
        encoder_layers=6,
        decoder_layers=6,
        max_source_length=128,
        max_target_length=128,
    ),
    "tiny": ModelConfig(
        family="encoder_decoder",
        vocab_size=10_000,
        d_model=128,
        heads=4,
        d_ff=256,
        encoder_layers=4,
        decoder_layers=4,
        max_source_length=128,
        max_target_length=128,
    ),
}
LENGTHS = {"base": (20, 32), "tiny": (15, 16)}
"""Source and target tokens: what a sentence of each takes in practice."""


def build_model(shape: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(SHAPES[shape]).eval()


def graphs(shape: str, model: Transformer, precision: str = "fp32") -> Path:
    """The folder of the exported graphs, made once. int8 takes its scales from random texts: only its speed is of use."""
    folder = BUILD / shape / precision
    if (folder / "decode.onnx").exists():
        return folder
    model = copy.deepcopy(model)
    if precision == "int8":
        source, target = torch.randint(4, model.config.vocab_size, (8, 20)), torch.randint(4, model.config.vocab_size, (8, 20))
        observe(model, lambda: model(source, torch.full((8,), 20), target))
    for name, module in graph_modules(model).items():
        if precision == "int8":
            quantize(module)
        trace(module, model.config, folder / f"{name}.onnx")
    return folder


def machine() -> str:
    """What the numbers were measured on, in words."""
    names = {"model name": platform.processor() or platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            names[key.strip()] = value.strip()
    return f"{names['model name']}, {torch.get_num_threads()} cores"
