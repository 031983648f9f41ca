"""Attention in a traced graph: ONNX Runtime's ``GroupQueryAttention`` with the trained projections around it.

Shapes as in ``export.graphs``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import MultiHeadAttention


def group_query_attention(
    packed_or_query: Tensor,
    new: Tensor | None,
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
) -> tuple[Tensor, ...]:
    """The operator ``com.microsoft::GroupQueryAttention``.

    Args:
        packed_or_query: [B, T, (H + 2G) K] with ``new`` None, or queries alone, [B, T, H K].
        new: [B, 0, G K], in place of keys and values where the cache holds all of them already.
        past: two of [B, G, C, K], appended to in place when the caller binds output and input to one buffer.
        last: [B] int32, position of each row's last token of this call.
        total: int32 scalar, the largest of ``last`` plus one.
        scales: of int8 caches, keys' and values', each [1, G, 1, K].

    Returns:
        [B, T, H K] and, where there is a past, the two caches.
    """
    batch, length = packed_or_query.shape[:2]
    inputs = [packed_or_query, new, new, *(past or (None, None)), last, total, *(rotary or (None, None))]
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "do_rotary": int(rotary is not None),
        "causal": int(causal),
    }
    if scales:
        inputs += [None, None, None, *scales]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    caches = past or ()
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=[packed_or_query.dtype, *(cache.dtype for cache in caches)],
            shapes=[(batch, length, heads * width), *(cache.shape for cache in caches)],
            version=1,
        )
    )


class Sizes(TypedDict):
    heads: int
    kv_heads: int
    width: int


class Padding(NamedTuple):
    """Where the N tokens of sources of different lengths lie among B x S places.

    Attention wants every source padded to the longest. All else is done for the tokens alone: of natural texts that are encoded
    together, up to half the places hold none.
    """

    tokens: Tensor
    """[N] place of each token, counted through [B, S]."""
    places: Tensor
    """[B, S] token of each place; that of the place before where there is none."""

    @classmethod
    def of(cls, last: Tensor, length: int) -> Padding:
        """Args: last: [B] position of each source's last token."""
        present = torch.arange(length)[None] <= last[:, None]  # [B, S]
        return cls(
            tokens=present.flatten().nonzero().squeeze(1),
            places=(present.flatten().to(torch.int64).cumsum(0) - 1).view(present.shape),
        )

    def remove(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [N, ...]."""
        return _pick(x.flatten(0, 1), self.tokens)

    def insert(self, x: Tensor) -> Tensor:
        """[N, D] -> [B, S, D]."""
        return _pick(x, self.places)


def _pick(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices] as one ``Gather``; the tracer makes more than that of an indexing."""
    return F.embedding(indices, x) if x.dim() == 2 else x.index_select(0, indices)


class SelfAttention(nn.Module):
    """Self-attention with one matrix product for queries, keys and values."""

    def __init__(self, trained: MultiHeadAttention, rotary: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.sizes = Sizes(heads=trained.heads, kv_heads=trained.kv_heads, width=trained.width)
        self.packed = stack_linear(trained.query, trained.key, trained.value)
        self.out = trained.out
        self.rotary = rotary


class SourceAttention(SelfAttention):
    """Among the tokens of each source, in both directions."""

    def forward(self, x: Tensor, padding: Padding, last: Tensor, total: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        packed = padding.insert(self.packed(x))  # [B, S, (H + 2G) K]
        (y,) = group_query_attention(packed, None, None, last, total, rotary=self.rotary, causal=False, **self.sizes)
        return self.out(padding.remove(y))


class TargetAttention(SelfAttention):
    """Of new tokens to those before them, which are in a cache if there is one."""

    def __init__(self, trained: MultiHeadAttention, rotary: tuple[Tensor, Tensor] | None) -> None:
        super().__init__(trained, rotary)
        self.scales = cache_scales(trained)

    def forward(
        self, x: Tensor, batch: int, past: tuple[Tensor, Tensor] | None, last: Tensor, total: Tensor
    ) -> tuple[Tensor, ...]:
        packed = by_rows(self.packed(x), batch)  # [B, T, (H + 2G) K]
        scales = None if past is None else self.scales
        y, *present = group_query_attention(packed, None, past, last, total, rotary=self.rotary, scales=scales, **self.sizes)
        return self.out(_shaped_like(x, y)), *present


class CrossAttention(nn.Module):
    """Attention to source positions whose keys and values were computed when the request joined."""

    def __init__(self, trained: MultiHeadAttention) -> None:
        super().__init__()
        self.sizes = Sizes(heads=trained.heads, kv_heads=trained.kv_heads, width=trained.width)
        self.query, self.out = trained.query, trained.out
        self.scales = cache_scales(trained)

    def forward(
        self, x: Tensor, batch: int, source: tuple[Tensor, Tensor], new: Tensor, last: Tensor, total: Tensor
    ) -> tuple[Tensor, ...]:
        query = by_rows(self.query(x), batch)  # [B, 1, H K]
        y, *present = group_query_attention(query, new, source, last, total, scales=self.scales, **self.sizes)
        return self.out(_shaped_like(x, y)), *present


class VisibleCrossAttention(nn.Module):
    """Cross-attention that shows its weights, in plain operators, for several hypotheses of one source."""

    def __init__(self, trained: MultiHeadAttention) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = trained.heads, trained.kv_heads, trained.width
        self.query, self.out = trained.query, trained.out
        self.scales = cache_scales(trained)

    def forward(self, x: Tensor, source: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What is attended to, [B, T, D], and the weights [B, H, T, S].

        Args:
            x: [B, T, D].
            source: keys and values of the one source, each [1, G, S, K].
        """
        keys, values = source
        if self.scales is not None:
            keys, values = keys.to(x.dtype) * self.scales[0], values.to(x.dtype) * self.scales[1]
        share = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(share, dim=1), values.repeat_interleave(share, dim=1)  # [1, H, S, K]
        query = self.query(x).unflatten(-1, (self.heads, self.width)).transpose(1, 2)  # [B, H, T, K]
        weights = (query @ keys.transpose(-2, -1) * self.width**-0.5).softmax(-1)  # [B, H, T, S]
        return self.out((weights @ values).transpose(1, 2).flatten(2)), weights


def by_rows(x: Tensor, batch: int) -> Tensor:
    """[N, D] or [B, T, D] -> [B, T, D]."""
    return x if x.dim() == 3 else x.unflatten(0, (batch, -1))


def _shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """y [B, T, D] as [N, D] if x is."""
    return y if x.dim() == 3 else y.flatten(0, 1)


def cache_scales(trained: MultiHeadAttention) -> tuple[Tensor, Tensor] | None:
    """Scales of this attention's int8 caches, each [1, G, 1, K]; None keeps them as computed. See export.quantize."""
    if not hasattr(trained, "cache_ranges"):
        return None
    key, value = (
        (r.clamp(min=1e-6) / 127).view(1, trained.kv_heads, 1, -1) for r in cast(tuple[Tensor, Tensor], trained.cache_ranges)
    )
    return key, value


def stack_linear(*parts: nn.Linear) -> nn.Linear:
    """One linear map instead of several of the same input."""
    whole = nn.Linear(parts[0].in_features, sum(p.out_features for p in parts), bias=parts[0].bias is not None)
    if hasattr(parts[0], "input_range"):  # see export.quantize
        whole.input_range = parts[0].input_range
    whole.weight = nn.Parameter(torch.cat([p.weight for p in parts]).detach())
    if parts[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([cast(Tensor, p.bias) for p in parts]).detach())
    return whole
