"""Attention, from the equation to multi-head.

Shapes: B batch, T queries, S keys, D model width, H query heads, G key/value heads (G divides H), K head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one attention, each [B, G, S, K]: what incremental decoding keeps."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    r"""Scaled dot-product attention, equation 1 of "Attention Is All You Need".

    .. math:: \mathrm{Attention}(Q, K, V) = \mathrm{softmax}(Q K^T / \sqrt{d_k}) V

    Args:
        q: [B, H, T, K].
        k, v: [B, G, S, K]; each of the G heads serves H / G query heads.
        mask: True where a query may look, broadcastable to [B, H, T, S].
    """
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # [B, H, S, K]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # [B, H, T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return weights @ v  # [B, H, T, K]


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[T, S]: the last query sees every key, each one before it one key fewer."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """[B, 1, 1, S]: True on the first ``lengths`` positions of each row."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None, None, :]


def rotary_table(length: int, width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), each [length, K / 2]."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x_i, x_{i + K/2}) of [B, H, T, K] by the angles of its T positions, [T, K / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class MultiHeadAttention(nn.Module):
    """Section 3.2.2. Keys and values are computed apart from the queries, so that a caller can keep them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.heads, config.key_value_heads, config.head_width
        self.dropout = config.attention_dropout
        kv_width = self.kv_heads * self.width
        self.query = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def self_projections(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, KeyValue]:
        """Queries [B, H, T, K], and keys and values as ``keys_values``, of the same ``x`` [B, T, D]."""
        q, k, v = _maps(x, self.query, self.key, self.value)
        return self._place(q, self.heads, rotary), (self._place(k, self.kv_heads, rotary), self._place(v, self.kv_heads, None))

    def keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> KeyValue:
        """[B, S, D] -> two of [B, G, S, K], keys rotated to their positions when ``rotary`` is given."""
        k, v = _maps(x, self.key, self.value)
        return self._place(k, self.kv_heads, rotary), self._place(v, self.kv_heads, None)

    def forward(
        self, x: Tensor, keys_values: KeyValue, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Queries from ``x`` [B, T, D], attending to ``keys_values``; returns [B, T, D]."""
        return self.attend(self._place(self.query(x), self.heads, rotary), keys_values, mask)

    def attend(self, q: Tensor, keys_values: KeyValue, mask: Tensor | None) -> Tensor:
        """[B, H, T, K] -> [B, T, D]."""
        y = attention(q, *keys_values, mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))  # [B, T, D]

    def _place(self, x: Tensor, heads: int, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x.unflatten(-1, (heads, self.width)).transpose(1, 2)  # [B, H, T, K]
        return rotate(x, *rotary) if rotary else x


def _maps(x: Tensor, *maps: nn.Linear) -> Sequence[Tensor]:
    """Several linear maps of one input: in training as one matrix product, which reads (and under autocast casts) ``x`` once.

    In evaluation each map is called by itself, so that hooks on it see what passes.
    """
    if not maps[0].training:
        return [linear(x) for linear in maps]
    bias = None if maps[0].bias is None else torch.cat([linear.bias for linear in maps])
    together = F.linear(x, torch.cat([linear.weight for linear in maps]), bias)
    return together.split([linear.out_features for linear in maps], dim=-1)
