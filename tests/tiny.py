"""Tiny models with random weights, exported once a test run: real graphs, milliseconds a step."""

from __future__ import annotations

import atexit
import copy
import functools
import random
import shutil
import string
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.build import build_bundle
from export.graphs import graph_modules
from export.quantize import observe, quantize
from export.trace import trace
from model.checkpoint import Run, save_weights, write_record
from model.config import ModelConfig
from model.files import write_json_lines
from model.tokenizer import Tokenizer
from model.transformer import Transformer

LETTERS = string.ascii_lowercase + string.digits
TOKENIZER = Tokenizer.train_characters([LETTERS])
"""Ids 4 to 39."""

SHAPES: dict[str, ModelConfig] = {
    "encoder_decoder": ModelConfig(
        family="encoder_decoder",
        vocab_size=TOKENIZER.vocab_size,
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
        vocab_size=TOKENIZER.vocab_size,
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
        vocab_size=TOKENIZER.vocab_size,
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


def shape(family: str, /, **changes: Any) -> ModelConfig:
    return replace(SHAPES[family], **changes)


VARIANTS: dict[str, ModelConfig] = {
    f"{family}: {', '.join(map(str, changes.values())) or 'as it is'}": shape(family, **changes)
    for family, changes in [
        ("encoder_decoder", {}),
        (
            "encoder_decoder",
            {"norm": "pre", "positions": "learned", "kv_heads": 2, "tied_embeddings": "output", "activation": "gelu"},
        ),
        (
            "encoder_decoder",
            {"positions": "rotary", "heads": 2, "kv_heads": 1, "tied_embeddings": "none", "bias": False},
        ),
        (
            "encoder_decoder",
            {"norm": "pre", "positions": "rotary", "heads": 2, "share_layers": True, "scale_embeddings": False},
        ),
        ("decoder_only", {}),
        ("decoder_only", {"norm": "post", "positions": "sinusoidal", "heads": 4, "kv_heads": None, "activation": "relu"}),
        ("decoder_only", {"positions": "learned", "heads": 4, "kv_heads": 2, "tied_embeddings": "none", "share_layers": True}),
        ("decoder_only", {"norm": "post", "kv_heads": None, "tied_embeddings": "all", "bias": True}),
        ("encoder_only", {}),
        ("encoder_only", {"norm": "post", "positions": "sinusoidal", "pooling": "first", "classes": 0, "kv_heads": 2}),
        ("encoder_only", {"positions": "rotary", "heads": 2, "pooling": "first", "bias": False, "activation": "gelu"}),
        ("encoder_only", {"norm": "post", "share_layers": True, "classes": 0, "kv_heads": 1}),
    ]
}
"""Every value of every option that changes a graph, in each family that it concerns."""


@functools.cache
def model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random weights that make a lively model: what it says depends on every token and every parameter, texts differ and end.

    At the usual initial weights it would repeat its last token whatever the source, and many a defect would not show.
    """
    torch.manual_seed(seed)
    network = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:  # biases and norms, so that a graph that forgets them is wrong
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("positions"):
                parameter.normal_()
            elif name.endswith(".weight"):  # linear maps
                parameter.normal_(std=2 * parameter.size(1) ** -0.5)
        if config.has_decoder:
            _liven(network, random.Random(seed))
    return network


@functools.cache
def exact_model(config: ModelConfig) -> Transformer:
    """``model`` in double precision, where rounding explains no difference above 1e-9."""
    return copy.deepcopy(model(config)).double()


def _liven(network: Transformer, rng: random.Random) -> None:
    """Makes the output matrix favour no token but the end, a little, and spreads logits by a standard deviation of 2."""
    tokens = torch.tensor([token_ids(rng, 16, network.config.vocab_size) for _ in range(64)])
    inputs = (tokens.flip(0), torch.arange(64) % 16 + 1, tokens) if network.config.has_encoder else (tokens,)
    output = network.output_weight
    for _ in range(3):  # with tied matrices, each correction changes the states
        states = network.features(*inputs)
        common = states.mean((0, 1))
        output -= torch.outer(output @ common, common) / common.square().sum()
        output *= 2 / (states @ output.T).std()
    output[Tokenizer.EOS] += 2 * common / common.square().sum()


@functools.cache
def graphs(config: ModelConfig, seed: int = 0, precision: str = "fp32", shortlist: tuple[int, ...] | None = None) -> Path:
    """The folder of the model's exported graphs; int8 takes its scales from random texts."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-graphs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _trace(graph_modules(_observed(config, seed, precision), precision, shortlist), config, folder, precision)
    return folder


@functools.cache
def graphs_with_alignment(config: ModelConfig, precision: str = "fp32") -> Path:
    """``graphs``, and the one that finds where the decoder looked."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-graphs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(graphs(config, precision=precision), folder, dirs_exist_ok=True)
    modules = graph_modules(_observed(config, 0, precision), precision, alignment=True)
    _trace({"align": modules["align"]}, config, folder, precision)
    return folder


def _observed(config: ModelConfig, seed: int, precision: str) -> Transformer:
    network = copy.deepcopy(model(config, seed))
    if precision == "int8":
        observe(network, lambda: _run_random_texts(network))
    return network


def _trace(modules: dict[str, nn.Module], config: ModelConfig, folder: Path, precision: str) -> None:
    for name, module in modules.items():
        if precision == "int8":
            quantize(module)
        trace(module, config, folder / f"{name}.onnx", precision)


def _run_random_texts(network: Transformer) -> None:
    rng = random.Random(1)
    texts = torch.tensor([token_ids(rng, 20, network.config.vocab_size) for _ in range(32)])
    lengths = torch.full((len(texts),), 20)
    if not network.config.has_encoder:
        network(texts)
    elif network.config.has_decoder:
        network(texts, lengths, texts.flip(0))
    else:
        network(texts, lengths)


def token_ids(rng: random.Random, length: int, vocab_size: int = TOKENIZER.vocab_size) -> list[int]:
    """No special tokens among them."""
    return [rng.randrange(4, vocab_size) for _ in range(length)]


_TASKS: dict[str, dict[str, Any]] = {
    "encoder_decoder": {"kind": "sequence_to_sequence", "metric": "exact_match", "labels": []},
    "decoder_only": {"kind": "language_model", "metric": "perplexity", "labels": []},
    "encoder_only": {"kind": "classification", "metric": "accuracy", "labels": ["bad", "fair", "good"]},
}


def run(config: ModelConfig, examples: int = 12) -> Run:
    """A run as if this model had been trained; its held-out examples are of many lengths."""
    rng = random.Random(0)

    def text(longest: int) -> str:
        return "".join(rng.choices(LETTERS, k=rng.randint(1, longest)))

    if config.family == "encoder_only":
        held_out = [{"source": text(20), "label": rng.choice(["bad", "fair", "good"])} for _ in range(examples)]
    else:
        held_out = [{"source": text(20), "target": text(18)} for _ in range(examples)]
    return Run(
        model=model(config),
        config=config,
        tokenizer=TOKENIZER,
        task={"name": "tiny", **_TASKS[config.family]},
        generation={"beams": 2, "length_penalty": 1.0, "max_tokens": 16},
        provenance={"seed": 0},
        held_out=held_out,
        calibration=[{"input": token_ids(rng, 9), "output": token_ids(rng, 7)} for _ in range(4)],
    )


def write_run(folder: Path, config: ModelConfig) -> Path:
    """``run`` as a directory."""
    written = run(config)
    folder.mkdir(parents=True)
    write_record(folder, config, written.task, written.generation, written.provenance)
    save_weights(written.model.state_dict(), folder / "best.safetensors")
    written.tokenizer.save(folder / "tokenizer.json")
    write_json_lines(folder / "held_out.jsonl", written.held_out)
    write_json_lines(folder / "calibration.jsonl", written.calibration)
    return folder


def write_bundle(folder: Path, family: str) -> Path:
    """A bundle, named after its family, of ``SHAPES[family]``; the run it came from lies beside it."""
    build_bundle(write_run(folder.with_name(f"{folder.name}.run"), SHAPES[family]), folder, name=family)
    return folder
