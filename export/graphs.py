"""The graphs of a bundle, as modules that are traced: the trained weights around ONNX Runtime's attention operator.

``GroupQueryAttention`` appends to a cache that its caller owns and takes a length per row, so one graph serves rows of any
age together. Cross-attention uses the same operator: the source's positions are the cache, and the last of them is handed in
as the "new" one, which rewrites what is already there.

Shapes: B rows, T new tokens a row, C cache capacity, S source positions, D model width, H query heads, G key/value heads,
K head width, L layers, V vocabulary, N = B x T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import MultiHeadAttention
from model.config import ModelConfig
from model.layers import DecoderLayer, EncoderLayer, Residual
from model.transformer import PositionedEmbedding, Transformer


def group_query_attention(
    packed_or_query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    last: Tensor,
    total: Tensor,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    rotary: tuple[Tensor, Tensor] | None = None,
    causal: bool = True,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``com.microsoft::GroupQueryAttention``.

    Args:
        packed_or_query: [B, T, (H + 2G) K] with key and value None, or queries alone, [B, T, H K].
        key, value: [B, T, G K].
        past: two of [B, G, C, K], appended to in place when the caller binds output and input to one buffer.
        last: [B] int32, position of each row's last token of this call.
        total: int32 scalar, the largest of ``last`` plus one.
        scales: of int8 caches, keys' and values', each [1, G, 1, K].

    Returns:
        [B, T, H K] and the two caches.
    """
    batch, length = packed_or_query.shape[:2]
    cache_shape: Sequence[int | torch.SymInt] = past[0].shape if past else (batch, kv_heads, length, width)
    inputs = [packed_or_query, key, value, *(past or (None, None)), last, total, *(rotary or (None, None))]
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "do_rotary": int(rotary is not None),
        "causal": int(causal),
    }
    if scales:
        inputs += [None, None, None, *scales]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    cache_dtype = torch.int8 if scales else packed_or_query.dtype
    y, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,
        dtypes=[packed_or_query.dtype, cache_dtype, cache_dtype],
        shapes=[(batch, length, heads * width), cache_shape, cache_shape],
        version=1,
    )
    return y, present_key, present_value


class Sizes(TypedDict):
    heads: int
    kv_heads: int
    width: int


class PackedSelfAttention(nn.Module):
    """Self-attention with one matrix product for queries, keys and values."""

    def __init__(self, trained: MultiHeadAttention, rotary: tuple[Tensor, Tensor] | None, causal: bool) -> None:
        super().__init__()
        self.sizes = Sizes(heads=trained.heads, kv_heads=trained.kv_heads, width=trained.width)
        self.packed = _stack_linear(trained.query, trained.key, trained.value)
        self.out = trained.out
        self.rotary, self.causal = rotary, causal
        self.scales = cache_scales(trained) if causal else None

    def forward(
        self, x: Tensor, batch: int, past: tuple[Tensor, Tensor] | None, last: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.packed(x).unflatten(0, (batch, -1))  # [B, T, (H + 2G) K]
        y, key, value = group_query_attention(
            packed, None, None, past, last, total, rotary=self.rotary, causal=self.causal, scales=self.scales, **self.sizes
        )
        return self.out(y.flatten(0, 1)), key, value  # [N, D]


class CrossAttention(nn.Module):
    """Attention to source positions whose keys and values were computed when the request joined."""

    def __init__(self, trained: MultiHeadAttention) -> None:
        super().__init__()
        self.sizes = Sizes(heads=trained.heads, kv_heads=trained.kv_heads, width=trained.width)
        self.query, self.out = trained.query, trained.out
        self.scales = cache_scales(trained)

    def forward(
        self, x: Tensor, batch: int, source: tuple[Tensor, Tensor], newest: tuple[Tensor, Tensor], last: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = self.query(x).unflatten(0, (batch, -1))  # [B, 1, H K]
        y, key, value = group_query_attention(
            query, newest[0], newest[1], source, last, total, scales=self.scales, **self.sizes
        )
        return self.out(y.flatten(0, 1)), key, value


def cache_scales(trained: MultiHeadAttention) -> tuple[Tensor, Tensor] | None:
    """Scales of this attention's int8 caches, each [1, G, 1, K]; None keeps them as computed. See export.quantize."""
    if not hasattr(trained, "cache_ranges"):
        return None
    key, value = (
        (r.clamp(min=1e-6) / 127).view(1, trained.kv_heads, 1, -1) for r in cast(tuple[Tensor, Tensor], trained.cache_ranges)
    )
    return key, value


def _stack_linear(*parts: nn.Linear) -> nn.Linear:
    """One linear map instead of several of the same input."""
    whole = nn.Linear(parts[0].in_features, sum(p.out_features for p in parts), bias=parts[0].bias is not None)
    if hasattr(parts[0], "input_range"):  # see export.quantize
        whole.input_range = parts[0].input_range
    whole.weight = nn.Parameter(torch.cat([p.weight for p in parts]).detach())
    if parts[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([cast(Tensor, p.bias) for p in parts]).detach())
    return whole


class Embedded(nn.Module):
    """Token embedding with its scale folded in, and positions looked up by id, so that rows may stand at different ones."""

    def __init__(self, trained: PositionedEmbedding, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", (weight * trained.scale).detach())
        self.register_buffer("table", None if trained.positions is None else trained.positions.detach().clone())

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Two of [B, T] -> [N, D]."""
        x = F.embedding(tokens.flatten(), cast(Tensor, self.weight))
        return x if self.table is None else x + F.embedding(positions.flatten(), cast(Tensor, self.table))


class EncoderStack(nn.Module):
    """The encoder over padded sources: [B, S] and lengths -> states [N, D]. Padding is computed but never attended to."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.embedding = Embedded(model.encoder_embedding, model.embedding)
        rotary = model.encoder.rotary(0, model.config.max_source_length)
        self.layers = cast(list[EncoderLayer], nn.ModuleList(model.encoder))
        self.attentions = nn.ModuleList(PackedSelfAttention(layer.attention, rotary, causal=False) for layer in self.layers)
        self.final_norm = model.encoder.final_norm

    def forward(self, source: Tensor, last: Tensor, total: Tensor) -> Tensor:
        batch, length = source.shape
        x = self.embedding(source, torch.arange(length).expand(batch, length))
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            y, _, _ = attention(layer.attention_residual.enter(x), batch, None, last, total)
            x = layer.attention_residual.leave(x, y)
            x = _feed_forward(x, layer.feed_forward, layer.feed_forward_residual)
        return cast(Tensor, self.final_norm(x))


def _feed_forward(x: Tensor, feed_forward: nn.Module, residual: Residual) -> Tensor:
    return residual.leave(x, feed_forward(residual.enter(x)))


class SourceGraph(nn.Module):
    """``encode`` of an encoder-decoder: everything the decoder needs of the source, computed once.

    source [B, S] int64, last [B] int32 (length - 1), total int32 -> for each decoder layer cross_key_i and cross_value_i,
    [B, G, S, K], and newest [B, L, 2, G K]: keys and values of each row's last position.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.config = model.config
        self.encoder = EncoderStack(model)
        self.cross = [cast(DecoderLayer, layer).cross_attention for layer in model.decoder]
        self.projections = nn.ModuleList(_stack_linear(cross.key, cross.value) for cross in self.cross)

    def forward(self, source: Tensor, last: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        batch, length = source.shape
        config = self.config
        states = self.encoder(source, last, total)
        final = states.unflatten(0, (batch, length))[torch.arange(batch), last.long()]  # [B, D]
        outputs, newest = [], []
        for projection, cross in zip(self.projections, self.cross, strict=True):
            both = projection(states).unflatten(0, (batch, length)).unflatten(2, (2, config.key_value_heads, -1))
            for i in range(2):
                cache = both[:, :, i].transpose(1, 2)  # [B, G, S, K]
                scales = cache_scales(cross)
                outputs.append(cache if scales is None else (cache / scales[i]).round().clamp(-127, 127).to(torch.int8))
            newest.append(projection(final).unflatten(1, (2, -1)))  # [B, 2, G K]
        return *outputs, torch.stack(newest, dim=1)


class ClassifyGraph(nn.Module):
    """``encode`` of an encoder-only model: source, last, total -> class probabilities [B, C] (if any) and vectors [B, D]."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.encoder = EncoderStack(model)
        self.classifier = model.classifier if model.config.classes else None
        self.first = model.config.pooling == "first"

    def forward(self, source: Tensor, last: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        batch, length = source.shape
        states = self.encoder(source, last, total).unflatten(0, (batch, length))  # [B, S, D]
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
    source_total int32, newest [B, L, 2, G K], and per layer cross_key_i, cross_value_i [B, G, S, K].

    Returns log-probabilities and ids of the top_k best next tokens, [B, top_k], best first; all logits [B, V]; then the caches
    in the order of the inputs. More than one new token is for decoder-only models, one row at a time (the operator's limit).
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.has_cross = model.config.has_encoder
        self.embedding = Embedded(model.decoder_embedding, model.target_embedding_weight)
        rotary = model.decoder.rotary(0, model.config.max_target_length)
        self.layers = cast(list[DecoderLayer], nn.ModuleList(model.decoder))
        self.attentions = nn.ModuleList(PackedSelfAttention(layer.self_attention, rotary, causal=True) for layer in self.layers)
        self.crosses = nn.ModuleList(CrossAttention(layer.cross_attention) for layer in self.layers if self.has_cross)
        self.final_norm = model.decoder.final_norm
        self.output = nn.Linear(model.config.d_model, model.config.vocab_size, bias=False)
        self.output.weight = nn.Parameter(model.output_weight.detach())
        if hasattr(model.decoder, "output_range"):  # see export.quantize
            self.output.input_range = model.decoder.output_range

    def forward(
        self, tokens: Tensor, positions: Tensor, last: Tensor, total: Tensor, top_k: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        batch, length = tokens.shape
        layers = len(self.layers)
        self_caches = _pairs(rest[: 2 * layers])
        presents: list[Tensor] = []
        if self.has_cross:
            source_last, source_total, newest = rest[2 * layers : 2 * layers + 3]
            cross_caches = _pairs(rest[2 * layers + 3 :])
            newest = newest.unsqueeze(3)  # [B, L, 2, 1, G K]
            cross_presents: list[Tensor] = []
        x = self.embedding(tokens, positions)  # [N, D]
        for i, layer in enumerate(self.layers):
            y, *present = self.attentions[i](layer.self_residual.enter(x), batch, self_caches[i], last, total)
            presents += present
            x = layer.self_residual.leave(x, y)
            if self.has_cross:
                y, *present = self.crosses[i](
                    layer.cross_residual.enter(x),
                    batch,
                    cross_caches[i],
                    (newest[:, i, 0], newest[:, i, 1]),  # [B, 1, G K]
                    source_last,
                    source_total,
                )
                cross_presents += present
                x = layer.cross_residual.leave(x, y)
            x = _feed_forward(x, layer.feed_forward, layer.feed_forward_residual)
        x = x.unflatten(0, (batch, length))[:, -1]  # [B, D]
        logits = self.output(self.final_norm(x)).float()  # [B, V]
        values, ids = torch.onnx.ops.symbolic_multi_out(
            "TopK",
            [logits.log_softmax(-1), top_k],
            {"axis": -1, "largest": 1, "sorted": 1},
            dtypes=[torch.float32, torch.int64],
            shapes=[logits.shape, logits.shape],  # really [B, top_k]: set_dynamic_axes says so to the graph
            version=11,
        )
        return values, ids, logits, *presents, *(cross_presents if self.has_cross else ())


def _pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def graph_modules(model: Transformer) -> dict[str, nn.Module]:
    """The graphs of a family, by the name of their file."""
    family = model.config.family
    if family == "encoder_only":
        return {"encode": ClassifyGraph(model)}
    decode: dict[str, nn.Module] = {"decode": DecodeGraph(model)}
    return {"encode": SourceGraph(model), **decode} if family == "encoder_decoder" else decode


def check_exportable(config: ModelConfig) -> list[str]:
    """Why this shape cannot be served, if it cannot: limits of the attention operator."""
    unit = 16 if config.positions == "rotary" else 8
    if config.head_width % unit:
        return [
            f"head width (d_model / heads) must be a multiple of {unit} with {config.positions} positions "
            f"for the attention operator, not {config.head_width}"
        ]
    return []
