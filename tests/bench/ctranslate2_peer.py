"""CTranslate2 on our own weights: a ``Transformer`` becomes one of its model directories through its specification classes.

Asked with ``return_end_token=True`` and ``min_decoding_length=0`` it writes what the reference decoder writes: then the end of
a text counts for its length penalty, and the first token may end the text. Three differences remain:

- At the length limit it collects the best unfinished hypotheses beside those that end there, whatever their number; the
  reference decoder does so only while fewer than ``beams`` have ended.
- A minimum length takes the end-of-text token out before the softmax, so that the other tokens share its probability; the
  reference decoder takes it out afterwards, and scores stay those of the model. Greedy texts are the same.
- In a batch of sources of different lengths, the attention that it returns and the coverage penalty that it computes from it
  depend on the neighbours. With ``max_batch_size=1`` they are the reference decoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from ctranslate2.specs import TransformerSpec, attention_spec, common_spec
from numpy.typing import NDArray
from torch import Tensor, nn

from model.attention import MultiHeadAttention
from model.layers import DecoderLayer, EncoderLayer, FeedForward
from model.transformer import PositionedEmbedding, Transformer

COMPUTE_TYPES = {"fp32": "float32", "int8": "int8"}
SPECIAL = ("<blank>", "<s>", "</s>", "<unk>")


class NotConvertible(ValueError):
    """A model that CTranslate2's Transformer cannot express: one line with every reason."""


def convert(model: Transformer, folder: Path, precision: str = "fp32") -> Path:
    """Writes ``model`` as a CTranslate2 model directory and returns it.

    Raises:
        NotConvertible: for a shape outside its specification.
    """
    config = model.config
    reasons = {
        "it is not an encoder-decoder": config.family != "encoder_decoder",
        "its positions are rotary": config.positions == "rotary",
        "it has fewer key/value heads than query heads": config.key_value_heads != config.heads,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise NotConvertible(f"CTranslate2 cannot take this model: {', '.join(found)}")
    activation = {"relu": common_spec.Activation.RELU, "gelu": common_spec.Activation.GELU}[config.activation]
    layers = config.encoder_layers, config.decoder_layers
    spec = TransformerSpec.from_config(
        layers, config.heads, pre_norm=config.norm == "pre", activation=activation, alignment_heads=config.heads
    )
    _embedding(spec.encoder, spec.encoder.embeddings[0], model.encoder_embedding, model.embedding)
    _embedding(spec.decoder, spec.decoder.embeddings, model.decoder_embedding, model.target_embedding_weight)
    spec.decoder.projection.weight = _array(model.output_weight)
    if config.norm == "pre":
        _norm(spec.encoder.layer_norm, model.encoder.final_norm)
        _norm(spec.decoder.layer_norm, model.decoder.final_norm)
    for target, layer in zip(spec.encoder.layer, model.encoder, strict=True):
        encoder_layer = cast(EncoderLayer, layer)
        _self_attention(target.self_attention, encoder_layer.attention)
        _norm(target.self_attention.layer_norm, encoder_layer.attention_residual.norm)
        _feed_forward(target.ffn, encoder_layer.feed_forward, encoder_layer.feed_forward_residual.norm)
    for target, layer in zip(spec.decoder.layer, model.decoder, strict=True):
        decoder_layer = cast(DecoderLayer, layer)
        cross = decoder_layer.cross_attention
        _self_attention(target.self_attention, decoder_layer.self_attention)
        _norm(target.self_attention.layer_norm, decoder_layer.self_residual.norm)
        _stack(target.attention.linear[0], cross.query)
        _stack(target.attention.linear[1], cross.key, cross.value)
        _stack(target.attention.linear[2], cross.out)
        _norm(target.attention.layer_norm, decoder_layer.cross_residual.norm)
        _feed_forward(target.ffn, decoder_layer.feed_forward, decoder_layer.feed_forward_residual.norm)
    vocabulary = words(range(config.vocab_size))
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    spec.config.layer_norm_epsilon = cast(EncoderLayer, next(iter(model.encoder))).attention_residual.norm.eps
    spec.validate()
    spec.optimize(COMPUTE_TYPES[precision])
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    return folder


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().numpy().copy()  # quantisation writes into what it is given


def _embedding(stack: Any, spec: common_spec.EmbeddingsSpec, trained: PositionedEmbedding, weight: Tensor) -> None:
    assert trained.positions is not None
    spec.weight = _array(weight)
    stack.scale_embeddings = trained.scale != 1.0
    stack.position_encodings.encodings = _array(trained.positions)


def _norm(spec: common_spec.LayerNormSpec, trained: nn.Module) -> None:
    assert isinstance(trained, nn.LayerNorm)
    spec.gamma = _array(trained.weight)
    spec.beta = np.zeros_like(spec.gamma) if trained.bias is None else _array(trained.bias)


def _stack(spec: common_spec.LinearSpec, *parts: nn.Linear) -> None:
    """One linear map whose outputs are those of ``parts``, one after another."""
    spec.weight = np.concatenate([_array(part.weight) for part in parts])
    if parts[0].bias is not None:
        spec.bias = np.concatenate([_array(part.bias) for part in parts])


def _self_attention(spec: attention_spec.MultiHeadAttentionSpec, trained: MultiHeadAttention) -> None:
    _stack(spec.linear[0], trained.query, trained.key, trained.value)
    _stack(spec.linear[1], trained.out)


def _feed_forward(spec: Any, trained: FeedForward, norm: nn.Module) -> None:
    _stack(spec.linear_0, trained.expand)
    _stack(spec.linear_1, trained.contract)
    _norm(spec.layer_norm, norm)


def words(ids: Sequence[int] | range) -> list[str]:
    """CTranslate2 speaks in tokens: each id by its name."""
    return [SPECIAL[i] if i < len(SPECIAL) else str(i) for i in ids]


def ids(tokens: Sequence[str]) -> list[int]:
    return [SPECIAL.index(token) if token in SPECIAL else int(token) for token in tokens]
