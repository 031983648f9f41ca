"""Where the decoder looks in the source: its cross-attention weights, layer by layer.

Shapes: L decoder layers, H heads, T target positions, S source positions, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.attention import MultiHeadAttention
from model.layers import DecoderLayer
from model.tokenizer import Tokenizer
from model.transformer import Transformer

BOS = Tokenizer.BOS
LEAST_SEEN = 2.0**-126
"""The least attention that a source token is said to have had: its logarithm must be a number."""


def alignment_weights(model: Transformer, source: Sequence[int], output: Sequence[int]) -> Tensor:
    """[T, S]: where the last layer's heads looked, on average, when each token of ``output`` was chosen.

    Args:
        source: ids with </s>.
        output: ids as the decoder wrote them, without <s>.
    """
    return cross_attention_weights(model, list(source), [BOS, *output[:-1]])[-1].mean(0)


def coverage(weights: Tensor) -> float:
    """How well an output covers its source: sum over i of log(min(sum over t of weights[t, i], 1)), at most 0.

    Wu et al. 2016, equation 14. Every token of the source counts, </s> too; one that was hardly looked at counts as LEAST_SEEN.

    Args:
        weights: [T, S], as ``alignment_weights`` gives them.
    """
    return float(weights.sum(0).clamp(LEAST_SEEN, 1.0).log().sum())


@torch.no_grad()
def cross_attention_weights(model: Transformer, source: list[int], target: list[int]) -> Tensor:
    """[L, H, T, S]: row t sums to 1 and says where the decoder looked when it had read ``target[: t + 1]``.

    Args:
        source: ids with </s>.
        target: ids as the decoder reads them, from <s> on.
    """
    device, weights = next(model.parameters()).device, list[Tensor]()

    def watch(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, (keys, _), _ = inputs
        weights.append(_weights(cast(MultiHeadAttention, attention), x, keys))

    handles = [cast(DecoderLayer, layer).cross_attention.register_forward_pre_hook(watch) for layer in model.decoder.layers]
    try:
        model.features(*(torch.tensor([x], device=device) for x in (source, len(source), target)))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(weights).cpu()


def _weights(attention: MultiHeadAttention, x: Tensor, keys: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K)) of one sentence without padding: [H, T, S]."""
    q = attention.query(x).unflatten(-1, (attention.heads, attention.width)).transpose(1, 2)  # [1, H, T, K]
    k = keys.repeat_interleave(attention.heads // attention.kv_heads, dim=1)  # [1, H, S, K]
    return (q @ k.transpose(-2, -1) / math.sqrt(attention.width)).softmax(-1)[0]
