"""The two layers everything is built from.

Shapes: B batch, T target positions, S source positions, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import KeyValue, MultiHeadAttention
from model.config import ModelConfig
from model.dropout import add_dropout, dropout

Rotary = tuple[Tensor, Tensor]


class FeedForward(nn.Module):
    """Position-wise feed-forward network, section 3.3: two linear maps with a non-linearity between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.contract = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = F.relu if config.activation == "relu" else F.gelu
        self.dropout = config.activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(dropout(self.activation(self.expand(x)), self.dropout, self.training))


class Residual(nn.Module):
    """Residual connection and layer norm around a sublayer, which runs between ``enter`` and ``leave``.

    post-norm (the paper):  x = norm(x + dropout(sublayer(x)))
    pre-norm:               x = x + dropout(sublayer(norm(x)))
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.pre = config.norm == "pre"
        self.dropout = config.dropout

    def enter(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.pre else x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        x = add_dropout(x, y, self.dropout, self.training)
        return x if self.pre else self.norm(x)


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config)
        self.attention_residual = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config)

    def forward(self, x: Tensor, mask: Tensor, rotary: Rotary | None) -> Tensor:
        """[B, S, D] -> [B, S, D]; ``mask`` [B, 1, 1, S] hides padding."""
        h = self.attention_residual.enter(x)
        q, keys_values = self.attention.self_projections(h, rotary)
        x = self.attention_residual.leave(x, self.attention.attend(q, keys_values, mask))
        return self.feed_forward_residual.leave(x, self.feed_forward(self.feed_forward_residual.enter(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's states where there is an encoder, feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config)
        self.self_residual = Residual(config)
        if config.has_encoder:
            self.cross_attention = MultiHeadAttention(config)
            self.cross_residual = Residual(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config)

    def read_source(self, states: Tensor) -> KeyValue:
        """Keys and values [B, G, S, K] of the encoder's states [B, S, D]: the same at every step, so made once."""
        return self.cross_attention.keys_values(states)

    def forward(
        self,
        x: Tensor,
        past: KeyValue | None,
        self_mask: Tensor | None,
        cross: KeyValue | None,
        cross_mask: Tensor | None,
        rotary: Rotary | None,
    ) -> tuple[Tensor, KeyValue]:
        """[B, T, D] -> [B, T, D], and the keys and values of all positions so far.

        Args:
            past: keys and values of the positions before these T.
            self_mask: [T, past + T], causal.
            cross: keys and values of the source, each [B, G, S, K].
            cross_mask: [B, 1, 1, S], hides the source's padding.
        """
        h = self.self_residual.enter(x)
        q, present = self.self_attention.self_projections(h, rotary)
        if past is not None:
            present = torch.cat([past[0], present[0]], dim=2), torch.cat([past[1], present[1]], dim=2)
        x = self.self_residual.leave(x, self.self_attention.attend(q, present, self_mask))
        if cross is not None:
            h = self.cross_residual.enter(x)
            x = self.cross_residual.leave(x, self.cross_attention(h, cross, cross_mask))
        x = self.feed_forward_residual.leave(x, self.feed_forward(self.feed_forward_residual.enter(x)))
        return x, present
