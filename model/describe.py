"""Parameter counts by part, without allocating a single weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.transformer import Transformer

_PARTS = {
    "embedding": "embedding",
    "target_embedding": "embedding",
    "output": "output",
    "positions": "positions",
    "attention": "attention",
    "feed_forward": "feed-forward",
    "classifier": "classifier",
}


@dataclass(frozen=True, slots=True)
class PartCount:
    """Parameters of one part of the network."""

    part: str
    matrices: int
    """Weights that are multiplied with: the number that papers quote."""
    vectors: int
    """Biases, norms and positions."""


def count_parameters(config: ModelConfig) -> list[PartCount]:
    """One entry for each part, largest matrices first.

    A part that is shared is counted once, where it is first used: a tied output matrix belongs to the embedding.
    """
    with torch.device("meta"):
        model = Transformer(config)
    matrices, vectors = dict[str, int](), dict[str, int]()
    for name, parameter in model.named_parameters():
        part = _part_of(name)
        is_matrix = parameter.dim() == 2 and part not in ("positions", "norm")
        counts = matrices if is_matrix else vectors
        counts[part] = counts.get(part, 0) + parameter.numel()
    parts = [PartCount(part, matrices.get(part, 0), vectors.get(part, 0)) for part in {**matrices, **vectors}]
    return sorted(parts, key=lambda p: (-p.matrices, -p.vectors))


def _part_of(name: str) -> str:
    """decoder.layers.3.self_attention.query.weight -> attention."""
    if "norm" in name:
        return "norm"
    if name.endswith("positions"):
        return "positions"
    return next(part for key, part in _PARTS.items() if any(key in word for word in name.split(".")))
