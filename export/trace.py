"""Tracing a graph module into an ONNX file, with the names and dynamic axes the runtime binds by.

Shapes as in ``export.graphs``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from export.bundle import CACHE_TYPES
from export.graphs import AlignGraph, ClassifyGraph, DecodeGraph, SourceGraph
from model.config import ModelConfig

OPSET = 20
_WEIGHTS = {"MatMulIntegerToFloat": (1,), "QGemm": (3, 5)}
"""Where eight-bit products have their weights and zero points of these."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What goes into a graph and what comes out: example tensors with the names of their dynamic axes."""

    inputs: dict[str, tuple[Tensor, dict[int, str]]]
    outputs: dict[str, dict[int, str]]


def source_signature(config: ModelConfig) -> Signature:
    axes = {0: "rows", 1: "source"}
    return Signature(
        inputs={
            "source": (torch.full((2, 3), 3), axes),
            "last": (torch.tensor([2, 1], dtype=torch.int32), {0: "rows"}),
            "total": (torch.tensor(3, dtype=torch.int32), {}),
        },
        outputs={"cross": {2: "rows", 4: "source"}},
    )


def classify_signature(config: ModelConfig) -> Signature:
    outputs = {"probabilities": {0: "rows"}} if config.classes else {}
    return Signature(source_signature(config).inputs, outputs | {"vectors": {0: "rows"}})


def decode_signature(config: ModelConfig, precision: str) -> Signature:
    rows, capacity, source = 2, 6, 5
    cache_dtype = getattr(torch, CACHE_TYPES[precision])
    heads, width, layers = config.key_value_heads, config.head_width, config.decoder_layers
    length = 1 if config.has_encoder else 3  # several new tokens at once: decoder-only models alone
    token_axes = {0: "rows"} if config.has_encoder else {0: "rows", 1: "tokens"}
    inputs: dict[str, tuple[Tensor, dict[int, str]]] = {
        "tokens": (torch.full((rows, length), 3), token_axes),
        "positions": (torch.arange(length).expand(rows, length).contiguous(), token_axes),
        "last": (torch.full((rows,), length - 1, dtype=torch.int32), {0: "rows"}),
        "total": (torch.tensor(length, dtype=torch.int32), {}),
        "top_k": (torch.tensor([4]), {}),
    }
    self_axes, cross_axes = {0: "rows", 2: "capacity"}, {0: "rows", 2: "source"}
    for name in _cache_names("self", layers):
        inputs[name] = torch.zeros(rows, heads, capacity, width, dtype=cache_dtype), self_axes
    outputs = {"top_log_probabilities": {0: "rows", 1: "top_k"}, "top_ids": {0: "rows", 1: "top_k"}, "logits": {0: "rows"}}
    outputs |= {f"{name}_out": self_axes for name in _cache_names("self", layers)}
    if config.has_encoder:
        inputs["source_last"] = torch.tensor([4, 2], dtype=torch.int32), {0: "rows"}
        inputs["source_total"] = torch.tensor(5, dtype=torch.int32), {}
        for name in _cache_names("cross", layers):
            inputs[name] = torch.zeros(rows, heads, source, width, dtype=cache_dtype), cross_axes
        outputs |= {f"{name}_out": cross_axes for name in _cache_names("cross", layers)}
    return Signature(inputs, outputs)


def align_signature(config: ModelConfig, precision: str) -> Signature:
    rows, length, source = 2, 3, 5
    cross = torch.zeros(config.decoder_layers, 2, 1, config.key_value_heads, source, config.head_width)
    return Signature(
        inputs={
            "tokens": (torch.full((rows, length), 3), {0: "rows", 1: "tokens"}),
            "last": (torch.full((rows,), length - 1, dtype=torch.int32), {0: "rows"}),
            "total": (torch.tensor(length, dtype=torch.int32), {}),
            "cross": (cross.to(getattr(torch, CACHE_TYPES[precision])), {4: "source"}),
        },
        outputs={"weights": {0: "rows", 1: "tokens", 2: "source"}},
    )


def _cache_names(kind: str, layers: int) -> list[str]:
    return [f"{kind}_{what}_{i}" for i in range(layers) for what in ("key", "value")]


def trace(module: nn.Module, config: ModelConfig, path: Path, precision: str) -> None:
    """Writes ``module``, which is of this precision, as an ONNX file, weights inside."""
    match module:
        case DecodeGraph():
            signature = decode_signature(config, precision)
        case AlignGraph():
            signature = align_signature(config, precision)
        case SourceGraph():
            signature = source_signature(config)
        case ClassifyGraph():
            signature = classify_signature(config)
        case _:
            raise TypeError(f"no signature for {type(module).__name__}")
    examples = tuple(tensor for tensor, _ in signature.inputs.values())
    # AUTO: the tracer finds out which axes must agree; the names below only label them.
    dynamic: tuple[Any, ...] = tuple(dict.fromkeys(axes, Dim.AUTO) for _, axes in signature.inputs.values())
    if isinstance(module, DecodeGraph):  # its inputs after the fifth are *rest
        dynamic = (*dynamic[:5], tuple(dynamic[5:]))
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            optimize=True,
            opset_version=OPSET,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    for value in graph.inputs:
        _name_axes(value, signature.inputs[str(value.name)][1])
    for value in graph.outputs:
        _name_axes(value, signature.outputs[str(value.name)])
    for node in graph:  # sizes of intermediates are the runtime's to find
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
        for place in _WEIGHTS.get(node.op_type, ()):
            _own(graph, node, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=False)


def _own(graph: ir.Graph, node: ir.Node, place: int) -> None:
    """Gives the node an initializer of its own for one that others use, too: layers may share weights, and the tracer makes one
    of zero points that are alike. Where ONNX Runtime has to make weights unsigned (``export.bundle.session_config``), it
    fails at the second node of an initializer."""
    shared = node.inputs[place]
    assert shared is not None
    assert shared.const_value is not None
    if len(shared.uses()) == 1:
        return
    own = ir.Value(name=f"{node.outputs[0].name}.{place}", const_value=ir.tensor(shared.const_value.numpy()))
    graph.register_initializer(own)
    node.replace_input_with(place, own)


def _name_axes(value: ir.Value, axes: dict[int, str]) -> None:
    assert value.shape is not None
    value.shape = ir.Shape([axes.get(i, size) for i, size in enumerate(value.shape)])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and deprecations of its own internals; what matters to us raises."""
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
