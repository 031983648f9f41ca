"""What a Transformer is: one frozen, self-checking description of its shape.

A configuration holds everything that is needed to rebuild the network from a file of weights, and nothing about how it was
trained or how it is served.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from model.typed_table import read_table

Family = Literal["encoder_decoder", "decoder_only", "encoder_only"]
Norm = Literal["post", "pre"]
Activation = Literal["relu", "gelu"]
Positions = Literal["sinusoidal", "learned", "rotary"]
Tying = Literal["all", "output", "none"]
Pooling = Literal["mean", "first"]


class ConfigError(ValueError):
    """A configuration that cannot be built. ``problems`` names every offending field, not only the first."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a Transformer ("Attention Is All You Need", Vaswani et al. 2017, and its two one-stack relatives).

    Raises:
        ConfigError: for impossible values, all of them at once, each by its field's name.
    """

    family: Family
    vocab_size: int
    """Number of ids of the one vocabulary that source and target share (V)."""
    d_model: int
    """Width of the residual stream (D)."""
    heads: int
    """Query heads per attention (H); each is d_model / heads wide (K)."""
    d_ff: int
    """Width of the hidden layer of the position-wise feed-forward network."""
    encoder_layers: int = 0
    decoder_layers: int = 0
    kv_heads: int | None = None
    """Key/value heads shared by groups of query heads (grouped-query attention, Ainslie et al. 2023); None: one per head."""
    max_source_length: int = 0
    """Longest source in tokens, special tokens included (families with an encoder)."""
    max_target_length: int = 0
    """Longest target in tokens, prompt and special tokens included (families with a decoder)."""
    norm: Norm = "post"
    """Layer normalisation after each residual sum (the paper) or before each sublayer, with a final one per stack."""
    activation: Activation = "relu"
    positions: Positions = "sinusoidal"
    tied_embeddings: Tying = "all"
    """"all": source, target and output share one matrix; "output": target and output share one; "none": all separate."""
    scale_embeddings: bool = True
    """Multiply embeddings by sqrt(d_model) (section 3.4 of the paper)."""
    bias: bool = True
    """Bias terms in linear maps and layer norms."""
    dropout: float = 0.1
    """On embeddings and on every sublayer's output."""
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    share_layers: bool = False
    """Reuse one layer's weights at every depth of a stack (Dehghani et al. 2019); the paper does not."""
    classes: int = 0
    """Number of classes of the head of an encoder-only model; 0: a pooled vector only."""
    pooling: Pooling = "mean"
    """How an encoder-only model turns its states into one vector."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, not {getattr(self, name)!r}"
            for name, kind in _CHOICES.items()
            if getattr(self, name) not in get_args(kind)
        ]
        problems += [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in ("vocab_size", "d_model", "heads", "d_ff")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} must be in [0, 1), not {getattr(self, name)}"
            for name in ("dropout", "attention_dropout", "activation_dropout")
            if not 0.0 <= getattr(self, name) < 1.0
        ]
        has_encoder, has_decoder = self.family != "decoder_only", self.family != "encoder_only"
        for present, layers, length in (
            (has_encoder, "encoder_layers", "max_source_length"),
            (has_decoder, "decoder_layers", "max_target_length"),
        ):
            for name in (layers, length):
                value = getattr(self, name)
                if present and value < 1:
                    problems.append(f"{name} must be at least 1 for {self.family}, not {value}")
                if not present and value != 0:
                    problems.append(f"{name} must be 0 for {self.family}, not {value}")
        if self.classes < 0 or (self.classes and self.family != "encoder_only"):
            problems.append(f"classes must be 0 for {self.family}, not {self.classes}")
        if self.classes == 1:
            problems.append("classes must be 0 or at least 2, not 1")
        problems += self._divisibility_problems()
        if problems:
            raise ConfigError(problems)

    def _divisibility_problems(self) -> list[str]:
        if self.heads < 1 or self.d_model < 1:
            return []
        if self.d_model % self.heads:
            return [f"d_model ({self.d_model}) must be divisible by heads ({self.heads})"]
        problems = []
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            problems.append(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.positions == "rotary" and self.head_width % 2:
            problems.append(f"rotary positions need an even head width, not {self.head_width}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            problems.append(f"sinusoidal positions need an even d_model, not {self.d_model}")
        return problems

    @property
    def head_width(self) -> int:
        """Width of one attention head (K)."""
        return self.d_model // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def has_encoder(self) -> bool:
        return self.family != "decoder_only"

    @property
    def has_decoder(self) -> bool:
        return self.family != "encoder_only"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Raises ConfigError for keys that are not fields, missing ones and values of a wrong type, all of them at once."""
        problems: list[str] = []
        config = read_table(cls, values, "", problems)
        if config is None:
            raise ConfigError(problems)
        return config


_CHOICES = {
    "family": Family,
    "norm": Norm,
    "activation": Activation,
    "positions": Positions,
    "tied_embeddings": Tying,
    "pooling": Pooling,
}

PRESETS: dict[str, ModelConfig] = {
    "transformer-base": ModelConfig(
        family="encoder_decoder",
        vocab_size=37_000,
        d_model=512,
        heads=8,
        d_ff=2048,
        encoder_layers=6,
        decoder_layers=6,
        max_source_length=256,
        max_target_length=256,
    ),
    "transformer-big": ModelConfig(
        family="encoder_decoder",
        vocab_size=37_000,
        d_model=1024,
        heads=16,
        d_ff=4096,
        encoder_layers=6,
        decoder_layers=6,
        max_source_length=256,
        max_target_length=256,
        dropout=0.3,
    ),
    "gpt3": ModelConfig(
        family="decoder_only",
        vocab_size=50_257,
        d_model=12_288,
        heads=96,
        d_ff=49_152,
        decoder_layers=96,
        max_target_length=2048,
        norm="pre",
        activation="gelu",
        positions="learned",
        tied_embeddings="none",
        scale_embeddings=False,
    ),
}
"""Published shapes: the two of the paper's table 3, and GPT-3 175B (Brown et al. 2020)."""
