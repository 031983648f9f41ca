"""The output matrix in a traced graph, and the search for the best tokens.

Shapes: B rows, D model width, V vocabulary, W width of the output.
"""

from __future__ import annotations

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
    """

    BLOCK = 128
    MOST = 64
    """The largest top_k: there must be as many blocks."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        vocab_size, width = model.output_weight.shape
        self.blocks = -(-vocab_size // self.BLOCK)
        self.has_blocks = self.blocks >= self.MOST
        padding = self.blocks * self.BLOCK - vocab_size if self.has_blocks else 0
        self.linear = nn.Linear(width, vocab_size + padding, bias=padding > 0)
        self.linear.weight = nn.Parameter(F.pad(model.output_weight.detach(), (0, 0, 0, padding)))
        if padding:
            bias = torch.zeros(vocab_size, dtype=self.linear.weight.dtype)
            self.linear.bias = nn.Parameter(F.pad(bias, (0, padding), value=-torch.inf))
        if hasattr(model.decoder, "output_range"):  # see export.quantize
            self.linear.input_range = model.decoder.output_range
        self.register_buffer("ids", torch.arange(self.blocks * self.BLOCK).view(-1, self.BLOCK))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, W]."""
        return cast(Tensor, self.linear(x))

    def best(self, log_p: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
        """The top_k largest of each row of [B, W] and their places, [B, top_k], best first."""
        if not self.has_blocks:
            return _top_k(log_p, top_k)
        blocks = log_p.unflatten(1, (-1, self.BLOCK))
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
