"""The network against PyTorch's own layers, and what every family and every option promises.

Shapes as in ``model.transformer``.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.attention import MultiHeadAttention, padding_mask
from model.config import ModelConfig
from model.layers import DecoderLayer, EncoderLayer, FeedForward, Residual
from model.transformer import EncoderOutput, Transformer, sinusoids
from tests import tiny

OPTIONS: dict[str, list[Any]] = {
    "norm": ["post", "pre"],
    "positions": ["sinusoidal", "learned", "rotary"],
    "kv_heads": [None, 1, 2],
    "tied_embeddings": ["all", "output", "none"],
    "bias": [True, False],
    "activation": ["relu", "gelu"],
    "share_layers": [False, True],
    "scale_embeddings": [True, False],
}
CONFIGS: dict[str, ModelConfig] = tiny.VARIANTS | {
    f"{family} {name}={value}": tiny.shape(family, heads=4, **{name: value})
    for family in ("encoder_decoder", "decoder_only")
    for name, values in OPTIONS.items()
    for value in values
}
DECODERS = [name for name, config in CONFIGS.items() if config.has_decoder]
ENCODERS = [name for name, config in CONFIGS.items() if config.has_encoder]


def random_batch(config: ModelConfig, target_length: int = 9) -> tuple[Tensor, ...]:
    """Inputs of ``forward``, sources of many lengths."""
    rng = random.Random(0)
    lengths = torch.tensor([1, config.max_source_length or 1, 5, 12])
    source = torch.tensor([tiny.token_ids(rng, int(lengths.max())) for _ in lengths])
    target = torch.tensor([tiny.token_ids(rng, target_length) for _ in lengths])
    if not config.has_encoder:
        return (target,)
    return (source, lengths, target) if config.has_decoder else (source, lengths)


# Against PyTorch's own layers


def torch_attention(theirs: nn.MultiheadAttention, ours: MultiHeadAttention) -> None:
    theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
    theirs.out_proj.weight.copy_(ours.out.weight)
    if theirs.in_proj_bias is not None:
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.bias.copy_(ours.out.bias)


def torch_rest(theirs: nn.Module, feed_forward: FeedForward, residuals: list[Residual]) -> None:
    theirs.linear1.load_state_dict(feed_forward.expand.state_dict())
    theirs.linear2.load_state_dict(feed_forward.contract.state_dict())
    for number, residual in enumerate(residuals, 1):
        getattr(theirs, f"norm{number}").load_state_dict(residual.norm.state_dict())


def torch_options(config: ModelConfig) -> dict[str, Any]:
    return {
        "d_model": config.d_model,
        "nhead": config.heads,
        "dim_feedforward": config.d_ff,
        "dropout": 0.0,
        "activation": config.activation,
        "norm_first": config.norm == "pre",
        "bias": config.bias,
        "batch_first": True,
        "dtype": torch.float64,
    }


@torch.no_grad()
def torch_encoder_layer(ours: EncoderLayer, config: ModelConfig) -> nn.TransformerEncoderLayer:
    theirs = nn.TransformerEncoderLayer(**torch_options(config))
    torch_attention(theirs.self_attn, ours.attention)
    torch_rest(theirs, ours.feed_forward, [ours.attention_residual, ours.feed_forward_residual])
    return theirs


@torch.no_grad()
def torch_decoder_layer(ours: DecoderLayer, config: ModelConfig) -> nn.TransformerDecoderLayer:
    theirs = nn.TransformerDecoderLayer(**torch_options(config))
    torch_attention(theirs.self_attn, ours.self_attention)
    torch_attention(theirs.multihead_attn, ours.cross_attention)
    torch_rest(theirs, ours.feed_forward, [ours.self_residual, ours.cross_residual, ours.feed_forward_residual])
    return theirs


LAYERS = [
    {"norm": norm, "activation": activation, "bias": bias}
    for norm, activation, bias in itertools.product(["post", "pre"], ["relu", "gelu"], [True, False])
]


@pytest.mark.parametrize("changes", LAYERS, ids=lambda c: " ".join(map(str, c.values())))
def test_encoder_layer_is_pytorchs(changes: dict[str, Any]) -> None:
    config = tiny.shape("encoder_decoder", **changes)
    ours = next(iter(tiny.exact_model(config).encoder))
    x, mask = torch.randn(3, 7, 32, dtype=torch.float64), padding_mask(torch.tensor([7, 3, 1]), 7)
    wanted = torch_encoder_layer(ours, config)(x, src_key_padding_mask=~mask[:, 0, 0])
    torch.testing.assert_close(ours(x, mask, None), wanted)


@pytest.mark.parametrize("changes", LAYERS, ids=lambda c: " ".join(map(str, c.values())))
def test_decoder_layer_is_pytorchs(changes: dict[str, Any]) -> None:
    config = tiny.shape("encoder_decoder", **changes)
    ours = next(iter(tiny.exact_model(config).decoder))
    x, states = torch.randn(3, 5, 32, dtype=torch.float64), torch.randn(3, 7, 32, dtype=torch.float64)
    mask, causal = padding_mask(torch.tensor([7, 3, 1]), 7), torch.ones(5, 5, dtype=torch.bool).tril()
    wanted = torch_decoder_layer(ours, config)(x, states, tgt_mask=~causal, memory_key_padding_mask=~mask[:, 0, 0])
    found, _ = ours(x, None, causal, ours.cross_attention.keys_values(states), mask, None)
    torch.testing.assert_close(found, wanted)


def test_the_whole_is_pytorchs_transformer() -> None:
    config = tiny.shape("encoder_decoder", norm="pre", tied_embeddings="none")  # PyTorch's stacks always end in a norm
    ours = tiny.exact_model(config)
    encoder_layers = [torch_encoder_layer(layer, config) for layer in ours.encoder]
    decoder_layers = [torch_decoder_layer(layer, config) for layer in ours.decoder]
    encoder = nn.TransformerEncoder(encoder_layers[0], 2, ours.encoder.final_norm, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(decoder_layers[0], 2, ours.decoder.final_norm)
    encoder.layers, decoder.layers = nn.ModuleList(encoder_layers), nn.ModuleList(decoder_layers)
    source, lengths, target = random_batch(config)

    def embedded(ids: Tensor, matrix: Tensor) -> Tensor:
        return matrix[ids] * math.sqrt(32) + sinusoids(ids.size(1), 32)

    hidden = ~padding_mask(lengths, source.size(1))[:, 0, 0]
    states = decoder(
        embedded(target, ours.target_embedding),
        encoder(embedded(source, ours.embedding), src_key_padding_mask=hidden),
        tgt_mask=~torch.ones(9, 9, dtype=torch.bool).tril(),
        memory_key_padding_mask=hidden,
    )
    torch.testing.assert_close(ours(source, lengths, target), states @ ours.output.T, rtol=0, atol=1e-9)


# Embeddings and positions


def test_sinusoids_are_the_papers() -> None:
    found = sinusoids(40, 16)
    for position, i in itertools.product(range(40), range(8)):
        angle = position / 10_000 ** (2 * i / 16)
        assert found[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert found[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("scaled", [True, False])
def test_an_embedding_is_scaled_and_stands_at_its_position(positions: str, scaled: bool) -> None:
    model = tiny.exact_model(tiny.shape("encoder_decoder", heads=2, positions=positions, scale_embeddings=scaled))
    tokens = torch.tensor([[7, 9, 7]])
    wanted = model.embedding[tokens] * (math.sqrt(32) if scaled else 1.0)
    if positions == "sinusoidal":
        wanted = wanted + sinusoids(24, 32)[4:7]
    elif positions == "learned":
        wanted = wanted + model.decoder_embedding.positions[4:7]
    torch.testing.assert_close(model.decoder_embedding(tokens, model.embedding, start=4), wanted)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_the_order_of_tokens_matters(positions: str) -> None:
    model = tiny.exact_model(tiny.shape("encoder_only", heads=2, positions=positions))
    one, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[6, 5, 7, 8]])
    difference = model(one, torch.tensor([4])).pooled - model(other, torch.tensor([4])).pooled
    assert difference.abs().max() > 1e-3


# Promises of every family and option


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoding_step_by_step_is_the_full_forward_pass(name: str) -> None:
    model, inputs = tiny.exact_model(CONFIGS[name]), random_batch(CONFIGS[name])
    *source, target = inputs
    memory = model.memory(*source) if source else None
    cache, logits, begin = None, [], 0
    for length in (1, 1, 3, 1, 2, 1):  # single tokens and chunks
        states, cache = model.decode(target[:, begin : begin + length], memory, cache)
        logits.append(model.logits(states))
        begin += length
    assert begin == target.size(1)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(*inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_padding_never_leaks(name: str) -> None:
    model, inputs = tiny.exact_model(CONFIGS[name]), random_batch(CONFIGS[name])
    source, lengths, *target = inputs
    padding = torch.arange(source.size(1)) >= lengths[:, None]
    whole = outputs(model(*inputs))
    repainted = outputs(model(source.masked_fill(padding, 3), *inputs[1:]))
    assert all(map(torch.equal, whole, repainted))
    for row, length in enumerate(lengths.tolist()):  # nor do neighbours, or the width of the batch
        alone = outputs(model(source[row : row + 1, :length], lengths[row : row + 1], *(t[row : row + 1] for t in target)))
        for found, wanted in zip(alone, whole, strict=True):
            torch.testing.assert_close(found[0], wanted[row], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_no_token_sees_a_later_one(name: str) -> None:
    model, inputs = tiny.exact_model(CONFIGS[name]), random_batch(CONFIGS[name])
    *source, target = inputs
    before = model(*inputs)
    for t in range(target.size(1)):
        changed = target.clone()
        changed[:, t] = (changed[:, t] - 3) % 36 + 4  # another ordinary token
        difference = (model(*source, changed) - before).abs().amax(dim=(0, 2))
        assert (difference[:t] <= 1e-9).all()
        assert difference[t] > 1e-3


def outputs(found: Tensor | EncoderOutput) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_logits_of_features_are_the_forward_pass(name: str) -> None:
    model, inputs = tiny.exact_model(CONFIGS[name]), random_batch(CONFIGS[name])
    torch.testing.assert_close(model.features(*inputs) @ model.output_weight.T, model(*inputs))


def test_dropout_acts_in_training_alone() -> None:
    changes = {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3}
    for name in changes:
        off = dict.fromkeys(changes, 0.0)
        model = Transformer(tiny.shape("encoder_decoder", **off | {name: 0.3}))
        inputs = random_batch(model.config)
        assert not torch.equal(model(*inputs), model(*inputs)), name
        assert torch.equal(model.eval()(*inputs), model(*inputs)), name


# Parameters


def attention_parameters(config: ModelConfig) -> int:
    d, kv = config.d_model, config.key_value_heads * config.head_width
    return 2 * d * d + 2 * d * kv + (2 * d + 2 * kv if config.bias else 0)


def expected_parameters(config: ModelConfig) -> int:
    d, f, bias = config.d_model, config.d_ff, config.bias
    norm, feed_forward = d * (1 + bias), 2 * d * f + (d + f if bias else 0)
    encoder_layer = attention_parameters(config) + feed_forward + 2 * norm
    decoder_layer = encoder_layer + (attention_parameters(config) + norm if config.has_encoder else 0)
    matrices = {"all": 1, "output": 1 + config.has_encoder, "none": 2 + config.has_encoder}[config.tied_embeddings]
    total = (matrices if config.has_decoder else 1) * config.vocab_size * d
    for layers, layer, length in (
        (config.encoder_layers, encoder_layer, config.max_source_length),
        (config.decoder_layers, decoder_layer, config.max_target_length),
    ):
        if layers:
            total += (1 if config.share_layers else layers) * layer
            total += norm if config.norm == "pre" else 0
            total += length * d if config.positions == "learned" else 0
    return total + (config.classes * (d + 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_by_hand(name: str) -> None:
    found = sum(parameter.numel() for parameter in tiny.model(CONFIGS[name]).parameters())
    assert found == expected_parameters(CONFIGS[name])


def test_tied_matrices_are_one() -> None:
    for tying, shared_source, shared_output in (("all", True, True), ("output", False, True), ("none", False, False)):
        model = tiny.exact_model(tiny.shape("encoder_decoder", tied_embeddings=tying))
        assert (model.target_embedding_weight is model.embedding) == shared_source
        assert (model.output_weight is model.target_embedding_weight) == shared_output


def test_shared_layers_are_applied_at_every_depth() -> None:
    shared = tiny.exact_model(tiny.shape("encoder_only", share_layers=True))
    layer = shared.encoder.layers[0]
    assert len(shared.encoder.layers) == 1
    source, lengths = random_batch(shared.config)
    mask = padding_mask(lengths, source.size(1))
    x = shared.encoder_embedding(source, shared.embedding)
    wanted = shared.encoder.final_norm(layer(layer(x, mask, None), mask, None))
    torch.testing.assert_close(shared.encode(source, lengths)[0], wanted)


def test_pooling_is_the_mean_of_real_tokens_or_the_first() -> None:
    for pooling in ("mean", "first"):
        model = tiny.exact_model(tiny.shape("encoder_only", pooling=pooling))
        source, lengths = random_batch(model.config)
        states, _ = model.encode(source, lengths)
        pooled = [row[:length].mean(0) if pooling == "mean" else row[0] for row, length in zip(states, lengths, strict=True)]
        found = model(source, lengths)
        torch.testing.assert_close(found.pooled, torch.stack(pooled))
        torch.testing.assert_close(found.logits, model.classifier(found.pooled))
    assert tiny.exact_model(tiny.shape("encoder_only", classes=0))(source, lengths).logits is None
