"""The Transformer: one network, three families.

Shapes: B batch, S source positions, T target positions, D model width, V vocabulary, C classes, G key/value heads,
K head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import KeyValue, causal_mask, padding_mask, rotary_table
from model.config import ModelConfig
from model.dropout import dropout
from model.layers import DecoderLayer, EncoderLayer, Rotary

PAD = 0


class EncoderOutput(NamedTuple):
    """What an encoder-only model says of a text."""

    logits: Tensor | None
    """[B, C]; None without a classification head."""
    pooled: Tensor
    """[B, D]."""


class Memory(NamedTuple):
    """The source as the decoder sees it: computed once, read at every step."""

    keys_values: list[KeyValue]
    """One for each decoder layer, each of [B, G, S, K]."""
    mask: Tensor
    """[B, 1, 1, S]."""


def sinusoids(length: int, width: int) -> Tensor:
    """Positional encodings of section 3.5, [length, D]: sines in even columns, cosines in odd ones."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * 10_000.0 ** (
        -torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


class PositionedEmbedding(nn.Module):
    """Token embeddings plus positions, section 3.4 and 3.5. The token matrix is passed in: it may be shared."""

    positions: Tensor | None

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        self.scale = math.sqrt(config.d_model) if config.scale_embeddings else 1.0
        self.dropout = config.dropout
        if config.positions == "sinusoidal":
            self.register_buffer("positions", sinusoids(length, config.d_model), persistent=False)
        elif config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(length, config.d_model))
        else:
            self.positions = None

    def forward(self, tokens: Tensor, weight: Tensor, start: int = 0) -> Tensor:
        """[B, T] -> [B, T, D], the first token standing at position ``start``."""
        x = F.embedding(tokens, weight) * self.scale
        if self.positions is not None:
            x = x + self.positions[start : start + tokens.size(1)]
        return dropout(x, self.dropout, self.training)


class Stack(nn.Module):
    """Layers applied one after another; with shared layers, the same one at every depth."""

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig, layer: type[EncoderLayer] | type[DecoderLayer], depth: int, length: int) -> None:
        super().__init__()
        self.depth = depth
        self.layers = nn.ModuleList(layer(config) for _ in range(1 if config.share_layers else depth))
        self.final_norm = nn.LayerNorm(config.d_model, bias=config.bias) if config.norm == "pre" else nn.Identity()
        self.is_rotary = config.positions == "rotary"
        if self.is_rotary:
            cos, sin = rotary_table(length, config.head_width)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.layers[i % len(self.layers)] for i in range(self.depth))

    def rotary(self, start: int, length: int) -> Rotary | None:
        if not self.is_rotary:
            return None
        return self.rotary_cos[start : start + length], self.rotary_sin[start : start + length]


class Transformer(nn.Module):
    """Encoder-decoder, decoder-only or encoder-only, as its configuration says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

        def matrix() -> nn.Parameter:
            return nn.Parameter(torch.empty(config.vocab_size, config.d_model))

        self.embedding = matrix()  # the source's in an encoder-decoder with separate embeddings
        if config.has_encoder:
            self.encoder_embedding = PositionedEmbedding(config, config.max_source_length)
            self.encoder = Stack(config, EncoderLayer, config.encoder_layers, config.max_source_length)
        if config.has_decoder:
            self.decoder_embedding = PositionedEmbedding(config, config.max_target_length)
            self.decoder = Stack(config, DecoderLayer, config.decoder_layers, config.max_target_length)
            if config.has_encoder and config.tied_embeddings != "all":
                self.target_embedding = matrix()
            if config.tied_embeddings == "none":
                self.output = matrix()
        if config.classes:
            self.classifier = nn.Linear(config.d_model, config.classes)
        self.reset_parameters()

    @property
    def target_embedding_weight(self) -> Tensor:
        return self.target_embedding if hasattr(self, "target_embedding") else self.embedding

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: logits are ``features @ output_weight.T``."""
        return self.output if hasattr(self, "output") else self.target_embedding_weight

    def reset_parameters(self) -> None:
        """Xavier for linear maps; embeddings so that, scaled or not, they start at the size of the positions."""
        config = self.config
        depth = config.encoder_layers + config.decoder_layers
        embedding_std = config.d_model**-0.5 if config.scale_embeddings else 0.02
        for name, parameter in self.named_parameters():
            if "norm" in name:
                (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(parameter)
            elif parameter.dim() == 1:
                nn.init.zeros_(parameter)
            elif name.endswith("positions"):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("embedding", "output")):
                nn.init.normal_(parameter, std=embedding_std)
                if not parameter.is_meta:
                    nn.init.zeros_(parameter.data[PAD])
            else:
                nn.init.xavier_uniform_(parameter, gain=2**-0.5 if name.endswith(("query.weight", "key.weight")) else 1.0)
                # Sums of many sublayers grow without a norm after each: scale down what enters them (GPT-2).
                if config.norm == "pre" and name.endswith(("out.weight", "contract.weight")):
                    parameter.data.mul_((2 * depth) ** -0.5)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] -> states [B, S, D] and the mask [B, 1, 1, S] that hides padding."""
        mask = padding_mask(lengths, source.size(1))
        rotary = self.encoder.rotary(0, source.size(1))
        x = self.encoder_embedding(source, self.embedding)
        for layer in self.encoder:
            x = layer(x, mask, rotary)
        return self.encoder.final_norm(x), mask

    def memory(self, source: Tensor, lengths: Tensor) -> Memory:
        """Everything the decoder needs of the source."""
        states, mask = self.encode(source, lengths)
        layers = cast(Iterable[DecoderLayer], self.decoder)
        return Memory([layer.read_source(states) for layer in layers], mask)

    def decode(
        self, tokens: Tensor, memory: Memory | None = None, cache: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Runs the decoder over the next T tokens of every row.

        Args:
            tokens: [B, T], following the positions already in ``cache``.
            cache: what the previous call returned; None at the start.

        Returns:
            Final states [B, T, D], and the cache with these T positions appended. The caller owns it.
        """
        start = 0 if cache is None else cache[0][0].size(2)
        length = tokens.size(1)
        mask = causal_mask(length, start + length, tokens.device) if length > 1 else None
        rotary = self.decoder.rotary(start, length)
        x = self.decoder_embedding(tokens, self.target_embedding_weight, start)
        present = []
        for i, layer in enumerate(self.decoder):
            cross, cross_mask = (None, None) if memory is None else (memory.keys_values[i], memory.mask)
            x, keys_values = layer(x, None if cache is None else cache[i], mask, cross, cross_mask, rotary)
            present.append(keys_values)
        return self.decoder.final_norm(x), present

    def features(self, *inputs: Tensor) -> Tensor:
        """Final decoder states [B, T, D] of whole targets; arguments as in ``forward``."""
        if self.config.has_encoder:
            source, lengths, target = inputs
            return self.decode(target, self.memory(source, lengths))[0]
        (tokens,) = inputs
        return self.decode(tokens)[0]

    def logits(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return F.linear(states, self.output_weight)

    def classify(self, source: Tensor, lengths: Tensor) -> EncoderOutput:
        states, mask = self.encode(source, lengths)
        if self.config.pooling == "first":
            pooled = states[:, 0]
        else:
            keep = mask[:, 0, 0, :, None].to(states.dtype)  # [B, S, 1]
            pooled = (states * keep).sum(1) / keep.sum(1)  # [B, D]
        return EncoderOutput(self.classifier(pooled) if self.config.classes else None, pooled)

    def forward(self, *inputs: Tensor) -> Tensor | EncoderOutput:
        """Whole sequences at once, as in training. All ids int64; targets may be padded with anything.

        encoder_decoder: (source [B, S], source lengths [B], target [B, T]) -> logits [B, T, V]
        decoder_only:    (tokens [B, T]) -> logits [B, T, V]
        encoder_only:    (source [B, S], source lengths [B]) -> EncoderOutput
        """
        if not self.config.has_decoder:
            source, lengths = inputs
            return self.classify(source, lengths)
        return self.logits(self.features(*inputs))
