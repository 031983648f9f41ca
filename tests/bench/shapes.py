"""The two shapes that are measured, with random weights that write like trained ones (``tests.bench.natural``)."""

from __future__ import annotations

import copy
import hashlib
import platform
import random
from pathlib import Path

import torch

import export
from export.graphs import graph_modules
from export.quantize import observe, quantize
from export.trace import trace
from model.config import ModelConfig
from model.decode import BOS, greedy_batch
from model.transformer import Transformer
from tests.bench.natural import natural_model, source_of

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
    return natural_model(SHAPES[shape])


def graphs(shape: str, model: Transformer, precision: str = "fp32") -> Path:
    """The folder of the exported graphs, made once for these weights and this code."""
    folder = BUILD / shape / f"{precision}-{_digest(model)}"
    if (folder / "decode.onnx").exists():
        return folder
    model = copy.deepcopy(model)
    if precision == "int8":
        observe(model, lambda: _run_examples(model))
    for name, module in graph_modules(model, precision).items():
        if precision == "int8":
            quantize(module)
        trace(module, model.config, folder / f"{name}.onnx", precision)
    return folder


def _run_examples(model: Transformer) -> None:
    """Texts of the model's own, from which int8 takes its scales."""
    rng = random.Random(0)
    sources = [source_of(rng, rng.randint(5, 40), model.config.vocab_size) for _ in range(32)]
    for source, text in zip(sources, greedy_batch(model, sources, 40), strict=True):
        model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[BOS, *text]]))


def _digest(model: Transformer) -> str:
    digest = hashlib.sha256(repr(model.config).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    for source in sorted(Path(export.__path__[0]).glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> str:
    """What the numbers were measured on, in words."""
    names = {"model name": platform.processor() or platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            names[key.strip()] = value.strip()
    return f"{names['model name']}, {torch.get_num_threads()} cores"
