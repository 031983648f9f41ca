"""The graphs of a bundle, as modules that are traced: the trained weights around ONNX Runtime's attention operator.

``GroupQueryAttention`` appends to a cache that its caller owns and takes a length per row, so one graph serves rows of any
age together. Cross-attention uses the same operator: the source's positions are the cache, and nothing is appended to it.

Between operators values are [N, D], or [B, T, D] in the decoder of eight-bit graphs: ``Gemm`` adds the bias in the product but
wants matrices, the eight-bit product takes any shape, and every reshaping that is left out is an operator less to dispatch.

Shapes: B rows, T new tokens a row, C cache capacity, S source positions, D model width, H query heads, G key/value heads,
K head width, L layers, V vocabulary, N tokens: B x T in the decoder, those of all sources in the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.attention import (
    CrossAttention,
    Padding,
    SourceAttention,
    TargetAttention,
    VisibleCrossAttention,
    by_rows,
    cache_scales,
    stack_linear,
)
from export.output_layer import OutputLayer
from model.config import ModelConfig
from model.layers import DecoderLayer, EncoderLayer, Residual
from model.transformer import PositionedEmbedding, Transformer


class Embedded(nn.Module):
    """Token embedding with its scale folded in, and positions looked up by id, so that rows may stand at different ones."""

    def __init__(self, trained: PositionedEmbedding, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", (weight * trained.scale).detach())
        self.register_buffer("table", None if trained.positions is None else trained.positions.detach().clone())

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Two of [B, T] or [N] -> [B, T, D] or [N, D]."""
        x = F.embedding(tokens, cast(Tensor, self.weight))
        return x if self.table is None else x + F.embedding(positions, cast(Tensor, self.table))


class EncoderStack(nn.Module):
    """The encoder over padded sources: [B, S] and lengths -> states [N, D] of the tokens, and where they belong."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.embedding = Embedded(model.encoder_embedding, model.embedding)
        rotary = model.encoder.rotary(0, model.config.max_source_length)
        self.layers = cast(list[EncoderLayer], nn.ModuleList(model.encoder))
        self.attentions = nn.ModuleList(SourceAttention(layer.attention, rotary) for layer in self.layers)
        self.final_norm = model.encoder.final_norm

    def forward(self, source: Tensor, last: Tensor, total: Tensor) -> tuple[Tensor, Padding]:
        padding = Padding.of(last, source.shape[1])
        positions = torch.arange(source.shape[1]).expand(source.shape)
        x = self.embedding(padding.remove(source), padding.remove(positions))  # [N, D]
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            y = attention(layer.attention_residual.enter(x), padding, last, total)
            x = layer.attention_residual.leave(x, y)
            x = _feed_forward(x, layer.feed_forward, layer.feed_forward_residual)
        return self.final_norm(x), padding


def _feed_forward(x: Tensor, feed_forward: nn.Module, residual: Residual) -> Tensor:
    return residual.leave(x, feed_forward(residual.enter(x)))


class SourceGraph(nn.Module):
    """``encode`` of an encoder-decoder: everything the decoder needs of the source, computed once.

    source [B, S] int64, last [B] int32 (length - 1), total int32 -> cross [L, 2, B, G, S, K], the keys and values that each
    decoder layer attends to.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        config = model.config
        self.heads, self.layers = config.key_value_heads, config.decoder_layers
        self.encoder = EncoderStack(model)
        attentions = [cast(DecoderLayer, layer).cross_attention for layer in model.decoder]
        self.projection = stack_linear(*(part for cross in attentions for part in (cross.key, cross.value)))
        self.quantized = cache_scales(attentions[0]) is not None
        if self.quantized:  # in units of the caches' scales, so that rounding is all that is left to do
            scales = torch.cat([scale.flatten() for cross in attentions for scale in cache_scales(cross) or ()])
            self.projection.weight.data /= scales[:, None]
            if self.projection.bias is not None:
                self.projection.bias.data /= scales

    def forward(self, source: Tensor, last: Tensor, total: Tensor) -> Tensor:
        states, padding = self.encoder(source, last, total)
        cross = self.projection(states)  # [N, L 2 G K]
        if self.quantized:
            one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)
            cross = torch.onnx.ops.symbolic(
                "QuantizeLinear", [cross, one, zero], dtype=torch.int8, shape=cross.shape, version=13
            )
        return padding.insert(cross).unflatten(2, (self.layers, 2, self.heads, -1)).permute(2, 3, 0, 4, 1, 5)


class ClassifyGraph(nn.Module):
    """``encode`` of an encoder-only model: source, last, total -> class probabilities [B, C] (if any) and vectors [B, D]."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.encoder = EncoderStack(model)
        self.classifier = model.classifier if model.config.classes else None
        self.first = model.config.pooling == "first"

    def forward(self, source: Tensor, last: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        length = source.shape[1]
        states, padding = self.encoder(source, last, total)
        states = padding.insert(states)  # [B, S, D]
        if self.first:
            pooled = states[:, 0]
        else:
            keep = (torch.arange(length)[None] <= last[:, None])[..., None]  # [B, S, 1]
            pooled = torch.where(keep, states, 0.0).sum(1) / (last[:, None] + 1)
        if self.classifier is None:
            return (pooled,)
        return self.classifier(pooled).float().softmax(-1), pooled


class DecodeGraph(nn.Module):
    """``decode``: one or more new tokens per row + caches -> the next token's candidates.

    Inputs: tokens [B, T] int64, positions [B, T] int64, last [B] int32 (position of the row's last token), total int32 (largest
    last + 1), top_k [1] int64; per layer self_key_i, self_value_i [B, G, C, K]; for encoder-decoders source_last [B] int32,
    source_total int32, and per layer cross_key_i, cross_value_i [B, G, S, K].

    Returns log-probabilities and ids of the top_k best next tokens, [B, top_k], best first; all logits [B, W], W >= V, or those
    of a shortlist (see OutputLayer); then the caches in the order of the inputs. More than one new token is for decoder-only
    models, one row at a time (the operator's limit).
    """

    def __init__(self, model: Transformer, flat: bool, shortlist: Sequence[int] | None = None) -> None:
        super().__init__()
        self.flat = flat
        self.has_cross = model.config.has_encoder
        self.embedding = Embedded(model.decoder_embedding, model.target_embedding_weight)
        rotary = model.decoder.rotary(0, model.config.max_target_length)
        self.layers = cast(list[DecoderLayer], nn.ModuleList(model.decoder))
        self.attentions = nn.ModuleList(TargetAttention(layer.self_attention, rotary) for layer in self.layers)
        self.crosses = nn.ModuleList(CrossAttention(layer.cross_attention) for layer in self.layers if self.has_cross)
        self.final_norm = model.decoder.final_norm
        self.output = OutputLayer(model, shortlist)
        self.new_width = model.config.key_value_heads * model.config.head_width

    def forward(
        self, tokens: Tensor, positions: Tensor, last: Tensor, total: Tensor, top_k: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        batch = tokens.shape[0]
        layers = len(self.layers)
        self_caches = _pairs(rest[: 2 * layers])
        presents: list[Tensor] = []
        x = self.embedding(tokens, positions)
        if self.has_cross:
            source_last, source_total = rest[2 * layers : 2 * layers + 2]
            cross_caches = _pairs(rest[2 * layers + 2 :])
            cross_presents: list[Tensor] = []
            new = x[:, :0, : self.new_width]
        if self.flat:
            x = x.flatten(0, 1)
        for i, layer in enumerate(self.layers):
            y, *present = self.attentions[i](layer.self_residual.enter(x), batch, self_caches[i], last, total)
            presents += present
            x = layer.self_residual.leave(x, y)
            if self.has_cross:
                y, *present = self.crosses[i](
                    layer.cross_residual.enter(x), batch, cross_caches[i], new, source_last, source_total
                )
                cross_presents += present
                x = layer.cross_residual.leave(x, y)
            x = _feed_forward(x, layer.feed_forward, layer.feed_forward_residual)
        x = by_rows(x, batch)[:, -1]  # [B, D]
        logits = self.output(self.final_norm(x)).float()
        values, ids = self.output.best(logits.log_softmax(-1), top_k)
        return values, ids, logits, *presents, *(cross_presents if self.has_cross else ())


class AlignGraph(nn.Module):
    """``align``: where the decoder looked in the source while it wrote some outputs, which it reads again from the beginning.

    tokens [B, T] int64 (<s> first, padded with anything), last [B] int32 (length - 1), total int32 (T), cross
    [L, 2, 1, G, S, K] as ``encode`` gives it for the one source of all outputs -> weights [B, T, S], the mean over the last
    layer's heads.

    A graph of its own, run once an output is whole: a decode step, and who shares it, pays nothing for it.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.embedding = Embedded(model.decoder_embedding, model.target_embedding_weight)
        rotary = model.decoder.rotary(0, model.config.max_target_length)
        self.layers = cast(list[DecoderLayer], nn.ModuleList(model.decoder))
        self.attentions = nn.ModuleList(TargetAttention(layer.self_attention, rotary) for layer in self.layers)
        self.crosses = nn.ModuleList(VisibleCrossAttention(layer.cross_attention) for layer in self.layers)

    def forward(self, tokens: Tensor, last: Tensor, total: Tensor, cross: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.embedding(tokens, torch.arange(length).expand(batch, length))
        for i, layer in enumerate(self.layers):
            (y,) = self.attentions[i](layer.self_residual.enter(x), batch, None, last, total)
            x = layer.self_residual.leave(x, y)
            y, weights = self.crosses[i](layer.cross_residual.enter(x), (cross[i, 0], cross[i, 1]))
            x = layer.cross_residual.leave(x, y)
            x = _feed_forward(x, layer.feed_forward, layer.feed_forward_residual)
        return weights.float().mean(1)


def _pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def graph_modules(
    model: Transformer, precision: str = "fp32", shortlist: Sequence[int] | None = None, *, alignment: bool = False
) -> dict[str, nn.Module]:
    """The graphs of a family, by the name of their file.

    Args:
        shortlist: the only tokens that outputs may contain, rising; None: all.
        alignment: with ``align``, for encoder-decoders.
    """
    family, flat = model.config.family, precision != "int8"
    if family == "encoder_only":
        return {"encode": ClassifyGraph(model)}
    graphs: dict[str, nn.Module] = {"decode": DecodeGraph(model, flat, shortlist)}
    if family == "encoder_decoder":
        graphs["encode"] = SourceGraph(model)
        if alignment:
            graphs["align"] = AlignGraph(model)
    return graphs


def check_exportable(config: ModelConfig) -> list[str]:
    """Why this shape cannot be served, if it cannot: limits of the attention operator."""
    unit = 16 if config.positions == "rotary" else 8
    if config.head_width % unit:
        return [
            f"head width (d_model / heads) must be a multiple of {unit} with {config.positions} positions "
            f"for the attention operator, not {config.head_width}"
        ]
    return []
