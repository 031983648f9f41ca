"""The output matrix in a traced graph, and the search for the best tokens.

Shapes: B rows, D model width, V vocabulary or, where there is one, shortlist, W width of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.transformer import Transformer


class OutputLayer(nn.Module):
    """Logits, and the best of them.

    ``TopK`` looks at each value with much ado. A large vocabulary is therefore cut into blocks: the k best tokens are in the k
    blocks with the largest maxima, and those are all that ``TopK`` sees. So that blocks are whole, the output is W >= V wide;
    the tokens beyond V have probability 0.

    Args:
        shortlist: the tokens to compute logits of, rising; None: all.
    """

    BLOCKS = (128, 64)
    """Tokens of a block: the first size of which there are enough."""
    MOST = 64
    """The largest top_k: there must be as many blocks."""

    def __init__(self, model: Transformer, shortlist: Sequence[int] | None = None) -> None:
        super().__init__()
        weight = model.output_weight.detach()
        tokens = torch.arange(len(weight)) if shortlist is None else torch.tensor(shortlist)
        vocab_size, width = len(tokens), weight.shape[1]
        self.block = next((size for size in self.BLOCKS if -(-vocab_size // size) >= self.MOST), 0)
        padding = -vocab_size % self.block if self.block else 0
        self.linear = nn.Linear(width, vocab_size + padding, bias=padding > 0)
        self.linear.weight = nn.Parameter(F.pad(weight[tokens], (0, 0, 0, padding)))
        if padding:
            bias = torch.zeros(vocab_size, dtype=self.linear.weight.dtype)
            self.linear.bias = nn.Parameter(F.pad(bias, (0, padding), value=-torch.inf))
        if hasattr(model.decoder, "output_range"):  # see export.quantize
            self.linear.input_range = model.decoder.output_range
        ids = F.pad(tokens, (0, padding))  # nobody sees the tokens of the padding
        self.register_buffer("ids", ids.view(-1, self.block) if self.block else ids)
        self.places_are_ids = shortlist is None

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, W]."""
        return cast(Tensor, self.linear(x))

    def best(self, log_p: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
        """The top_k largest of each row of [B, W] and their tokens, [B, top_k], best first."""
        if not self.block:
            values, at = _top_k(log_p, top_k)
            return values, at if self.places_are_ids else F.embedding(at, cast(Tensor, self.ids)[:, None]).squeeze(2)
        blocks = log_p.unflatten(1, (-1, self.block))
        _, which = _top_k(blocks.amax(2), top_k)  # [B, k]
        chosen = torch.onnx.ops.symbolic(
            "GatherND", [blocks, which.unsqueeze(2)], {"batch_dims": 1}, dtype=log_p.dtype, shape=blocks.shape, version=13
        )  # really [B, k, BLOCK], here and below
        values, at = _top_k(_join_blocks(chosen), top_k)
        return values, _join_blocks(F.embedding(which, cast(Tensor, self.ids))).gather(1, at)


def _join_blocks(x: Tensor) -> Tensor:
    """[B, k, BLOCK] -> [B, k BLOCK], whatever shape the tracer believes in."""
    batch, blocks, size = x.shape
    return torch.onnx.ops.symbolic(
        "Reshape", [x, torch.tensor([0, -1])], dtype=x.dtype, shape=(batch, blocks * size), version=14
    )


def _top_k(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    values, places = torch.onnx.ops.symbolic_multi_out(
        "TopK",
        [x, k],
        {"axis": -1, "largest": 1, "sorted": 1},
        dtypes=[x.dtype, torch.int64],
        shapes=[x.shape, x.shape],  # really [B, k]: the graph's own shapes are left to the runtime
        version=11,
    )
    return values, places
