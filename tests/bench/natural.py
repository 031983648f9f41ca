"""Random weights that write as trained ones do: texts that differ, beams that branch, and an end of its own for every text.

Speed depends on when texts end and on how often beams branch, so neither may be an accident of random weights. A text ends
where its source does: the last source token is a marker, and one head of the last cross-attention looks from each target
position at the source position of the same number; where it sees the marker, the end-of-text token wins by a wide margin,
whatever the precision and whatever was written so far. A few columns of the residual stream are kept free for this; everything
else is random.

Shapes: B batch, T positions, D model width, K head width.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.layers import DecoderLayer
from model.transformer import Transformer, sinusoids

EOS, MARKER, FIRST = 2, 3, 4
"""Ids: end of text, end of a source, the first that means nothing."""
ENCODER_GAIN = 0.1
"""Of every encoder sublayer's output: positions must survive it."""
SHARPNESS, LOGIT_SPREAD = 4.0, 4.0
"""Of the decoder's queries and keys, and the standard deviation of logits. With these a hypothesis in three leaves its parent's
row at a step of beam search, as in a model trained to translate, and a text repeats itself little."""
LEAST_ANGLE = 0.5
"""Radians a position."""
CONTRAST = 6.0
"""How much more the looking head thinks of the right position than of any other, in the exponent."""


def natural_length(rng: random.Random) -> int:
    """Tokens of a text, its end included: 5 to 40, most of them 9 to 19, as in Multi30k."""
    return min(40, max(5, round(rng.lognormvariate(math.log(13), 0.35))))


def source_of(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    """A random source of ``length`` tokens; the text that a ``natural_model`` makes of it has as many, its end included."""
    return [*(rng.randrange(FIRST, vocab_size) for _ in range(length - 1)), MARKER]


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of the residual stream that no sublayer writes to."""

    positions: Tensor
    """Sines and cosines of the positions, fast ones, so that neighbours differ."""
    marked: int
    """Set in the encoder at the marker."""
    ending: int
    """Set in the decoder where the text ends."""
    empty: int
    """Never set: what it holds is how far layer norms have shifted all free columns."""

    @classmethod
    def of(cls, config: ModelConfig) -> _Columns:
        width = config.d_model
        angles = 10_000.0 ** (-torch.arange(0, width, 2) / width)
        fitting = (angles > LEAST_ANGLE).nonzero()[:, 0]
        pairs = fitting[torch.linspace(0, len(fitting) - 1, min(len(fitting), config.head_width // 2)).round().long()]
        return cls(torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten(), width - 2, width - 4, width - 6)

    @property
    def all(self) -> Tensor:
        return torch.cat([self.positions, torch.tensor([self.marked, self.ending, self.empty])])


@torch.no_grad()
def natural_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A post-norm encoder-decoder with sinusoidal positions and one embedding matrix."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    columns = _Columns.of(config)
    _keep_free(model, columns)
    _mark(model, columns)
    _look(model, columns)
    sources, targets = (torch.randint(FIRST, config.vocab_size, (32, 24)) for _ in range(2))
    _keep_size(model, columns, sources, targets)
    _spread(model, columns, sources, targets)
    return model


def _keep_free(model: Transformer, columns: _Columns) -> None:
    """No token and no sublayer writes to the free columns."""
    model.embedding[:, columns.all] = 0.0
    for name, parameter in model.named_parameters():
        if name.endswith(("out.weight", "contract.weight")):
            parameter.mul_(ENCODER_GAIN if name.startswith("encoder") else 1.0)
            parameter[columns.all] = 0.0
        elif name.startswith("decoder") and name.endswith(("query.weight", "key.weight")):
            parameter.mul_(SHARPNESS)


def _mark(model: Transformer, columns: _Columns) -> None:
    embedding = model.embedding
    embedding[MARKER, columns.marked] = 4.0 / model.encoder_embedding.scale
    embedding[MARKER:] /= embedding[MARKER:].norm(dim=1, keepdim=True)  # of one size, so that positions keep theirs
    embedding[EOS] = 0.0
    model.embedding[EOS, columns.ending] = 3.0


def _look(model: Transformer, columns: _Columns) -> None:
    """The first head of the last cross-attention reads the mark at its own position and sets ``ending``."""
    attention = cast(DecoderLayer, list(model.decoder)[-1]).cross_attention
    waves = sinusoids(model.config.max_source_length, model.config.d_model)[:, columns.positions]
    likeness = waves @ waves[0]  # of positions that are so far apart
    contrast = likeness[0] - likeness[1:].max()
    head = slice(attention.width)
    eye = torch.zeros(attention.width, model.config.d_model)
    eye[torch.arange(len(columns.positions)), columns.positions] = 1.0
    eye -= eye.sum(1, keepdim=True) * F.one_hot(torch.tensor(columns.empty), model.config.d_model)
    eye *= math.sqrt(CONTRAST / contrast * math.sqrt(attention.width))
    attention.query.weight[head] = eye
    attention.key.weight[head] = eye
    attention.value.weight[head] = 0.0
    attention.value.weight[0, columns.marked], attention.value.weight[0, columns.empty] = 1.0, -1.0
    attention.out.weight[columns.ending, 0] = 1.0


def _keep_size(model: Transformer, columns: _Columns, sources: Tensor, targets: Tensor) -> None:
    """Every layer norm gives the free columns back at the size they had, as long as the others are of usual size."""

    def undo(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        cast(nn.LayerNorm, norm).weight[columns.all] = inputs[0].std(-1, correction=0).mean()

    handles = [m.register_forward_pre_hook(undo) for m in model.modules() if isinstance(m, nn.LayerNorm)]
    model.features(sources, torch.full((len(sources),), sources.size(1)), targets)
    for handle in handles:
        handle.remove()


def _spread(model: Transformer, columns: _Columns, sources: Tensor, targets: Tensor) -> None:
    """Makes the output matrix favour no token, and the logits spread as they should."""
    used = torch.ones(model.config.d_model, dtype=torch.bool)
    used[columns.all] = False
    last = cast(DecoderLayer, list(model.decoder)[-1]).feed_forward_residual.norm
    last.weight[used] = LOGIT_SPREAD
    last.weight[columns.marked] = 0.0
    last.weight[[columns.ending, columns.empty]] *= LOGIT_SPREAD
    lengths = torch.full((len(sources),), sources.size(1))
    for _ in range(3):  # inputs share the matrix, so each correction changes the states
        common = model.features(sources, lengths, targets).mean((0, 1)) * used  # [D]
        model.embedding.sub_(torch.outer(model.embedding @ common, common) / common.square().sum())
