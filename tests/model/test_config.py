"""A configuration refuses what cannot be built, everything at once and by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model.config import PRESETS, ConfigError, ModelConfig
from tests import tiny


def problems(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**values)
    assert str(caught.value) == "; ".join(caught.value.problems)
    return caught.value.problems


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        family="encoder_decoder",
        vocab_size=0,
        d_model=30,
        heads=4,
        d_ff=-1,
        encoder_layers=0,
        decoder_layers=2,
        max_source_length=5,
        max_target_length=0,
        norm="middle",
        dropout=1.0,
        attention_dropout=float("nan"),
        classes=3,
    )
    named = ["norm", "vocab_size", "d_ff", "dropout", "attention_dropout", "encoder_layers", "max_target_length", "classes"]
    assert [problem.split()[0] for problem in found] == [*named, "d_model"]


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("encoder_decoder", {"family": "both"}, "family"),
        ("encoder_decoder", {"positions": "relative"}, "positions"),
        ("encoder_decoder", {"activation": "tanh"}, "activation"),
        ("encoder_decoder", {"tied_embeddings": "some"}, "tied_embeddings"),
        ("encoder_only", {"pooling": "last"}, "pooling"),
        ("encoder_decoder", {"heads": 0}, "heads"),
        ("encoder_decoder", {"kv_heads": 3}, "kv_heads"),
        ("encoder_decoder", {"kv_heads": 0}, "kv_heads"),
        ("encoder_decoder", {"heads": 32, "positions": "rotary"}, "rotary"),
        ("encoder_decoder", {"d_model": 33, "heads": 3}, "sinusoidal"),
        ("encoder_decoder", {"dropout": -0.1}, "dropout"),
        ("encoder_decoder", {"activation_dropout": 1.0}, "activation_dropout"),
        ("decoder_only", {"encoder_layers": 1}, "encoder_layers"),
        ("decoder_only", {"max_source_length": 9}, "max_source_length"),
        ("decoder_only", {"decoder_layers": 0}, "decoder_layers"),
        ("decoder_only", {"classes": 2}, "classes"),
        ("encoder_only", {"decoder_layers": 1}, "decoder_layers"),
        ("encoder_only", {"classes": 1}, "classes"),
        ("encoder_only", {"classes": -2}, "classes"),
    ],
)
def test_each_impossible_value_is_refused_by_name(family: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.shape(family, **changes)
    assert any(problem.startswith(named) for problem in caught.value.problems)


@pytest.mark.parametrize("config", [*tiny.SHAPES.values(), *PRESETS.values()], ids=lambda c: f"{c.family} {c.d_model}")
def test_a_configuration_survives_its_dictionary(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_dictionary_is_checked_whole() -> None:
    values = tiny.shape("encoder_decoder").to_dict() | {"d_modle": 64, "d_ff": "64", "bias": 1, "kv_heads": 2.0, "norm": "mid"}
    del values["heads"]
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values)
    named = ["unknown key d_modle", "heads is missing", "d_ff must be", "kv_heads must be", "norm must be", "bias must be"]
    assert len(caught.value.problems) == len(named)
    for start in named:
        assert any(problem.startswith(start) for problem in caught.value.problems), start


def test_presets_are_the_published_shapes() -> None:
    base, big, gpt3 = PRESETS["transformer-base"], PRESETS["transformer-big"], PRESETS["gpt3"]
    assert (base.encoder_layers, base.d_model, base.d_ff, base.heads, base.head_width, base.dropout) == (
        6,
        512,
        2048,
        8,
        64,
        0.1,
    )
    assert (big.decoder_layers, big.d_model, big.d_ff, big.heads, big.head_width, big.dropout) == (6, 1024, 4096, 16, 64, 0.3)
    assert (gpt3.decoder_layers, gpt3.d_model, gpt3.d_ff, gpt3.heads, gpt3.max_target_length) == (96, 12288, 49152, 96, 2048)
    assert replace(base, d_model=1024, d_ff=4096, heads=16, dropout=0.3) == big


def test_what_follows_from_the_fields() -> None:
    config = tiny.shape("encoder_decoder")
    assert (config.head_width, config.key_value_heads, config.has_encoder, config.has_decoder) == (8, 4, True, True)
    assert tiny.shape("encoder_decoder", kv_heads=2).key_value_heads == 2
    assert not tiny.shape("decoder_only").has_encoder
    assert not tiny.shape("encoder_only").has_decoder
