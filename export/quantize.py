"""Eight-bit graphs whose answers do not depend on the batch.

Weights are int8 with a scale for each output; activations are uint8 with one fixed scale for each matrix product, found once
from training examples. Because nothing is measured at run time, a row's numbers cannot depend on its neighbours, and integer
sums are exact, so they are the same bits at any batch size. (Dynamic quantisation takes its scale from the whole batch: a
neighbour's outlier changes your answer.) A fixed scale is also the fastest: nothing has to be scanned before it is quantised.

Caches are int8 too, with a fixed scale for each channel: attention waits for memory, and there is a quarter of it to read.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import MultiHeadAttention
from model.layers import FeedForward
from model.transformer import Transformer


class InputRange:
    """A sample of the values that enter a matrix product, and their bounds, over as many calls as there are."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self.samples: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten().float()
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        # Not every n-th value: that would pick always the same channels.
        self.samples.append(x[torch.randint(x.numel(), (min(x.numel(), 4096),), generator=self._generator)])

    def scale_and_zero(self) -> tuple[float, int]:
        """The uint8 scale and zero point with the least squared error, clipping included."""
        values = torch.cat(self.samples)
        best = (float("inf"), 1.0, 0)
        for share in torch.linspace(0.5, 1.0, 26).tolist():
            scale = max(1e-8, (self.high - self.low) * share / 255)
            zero = round(-self.low * share / scale)
            rounded = ((values / scale).round() + zero).clamp(0, 255)
            error = float(((rounded - zero) * scale - values).square().mean())
            best = min(best, (error, scale, zero))
        return best[1], best[2]


def observe(model: Transformer, run: Callable[[], object]) -> None:
    """Runs ``run`` and notes what enters every matrix product of ``model``: attribute ``input_range`` of each linear map, and
    ``output_range`` of the decoder, for the output matrix; ``cache_ranges`` of each attention, for its keys and values."""
    handles = []
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            ranges = module.cache_ranges = tuple(torch.zeros(part.out_features) for part in (module.key, module.value))  # type: ignore[assignment]
            rotary_pairs = module.width // 2 if model.config.positions == "rotary" else 0
            handles.append(module.key.register_forward_hook(partial(_note_channels, ranges[0], rotary_pairs)))
            handles.append(module.value.register_forward_hook(partial(_note_channels, ranges[1], 0)))
        if isinstance(module, nn.Linear):
            module.input_range = InputRange()  # type: ignore[assignment]
            handles.append(module.register_forward_pre_hook(_note_input))
    if model.config.has_decoder:
        output_range = model.decoder.output_range = InputRange()  # type: ignore[assignment]
        handles.append(model.decoder.final_norm.register_forward_hook(partial(_note_output, output_range)))
    with torch.inference_mode():
        run()
    for handle in handles:
        handle.remove()


def _note_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    cast(InputRange, module.input_range).add(inputs[0])


def _note_output(noted: InputRange, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
    noted.add(output)


def _note_channels(largest: Tensor, rotary_pairs: int, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Keeps the largest size of each channel of keys or values; of a pair that rotates, the length."""
    sizes = output.abs().flatten(0, -2).amax(dim=0)
    if rotary_pairs:
        pairs = output.unflatten(-1, (-1, 2, rotary_pairs))  # [..., G, 2, K / 2]
        lengths = pairs.norm(dim=-2, keepdim=True).expand_as(pairs)
        sizes = lengths.flatten(-3).flatten(0, -2).amax(dim=0)
    torch.maximum(largest, sizes, out=largest)


class Int8Linear(nn.Module):
    """``nn.Linear`` on uint8 activations and int8 weights: ``QuantizeLinear`` and ``com.microsoft::MatMulIntegerToFloat``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale, zero = cast(InputRange, linear.input_range).scale_and_zero()
        weight = linear.weight.detach().float()  # [O, I]
        weight_scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127  # [O]
        self.outputs = linear.out_features
        self.register_buffer("input_scale", torch.tensor(scale))
        self.register_buffer("input_zero", torch.tensor(zero, dtype=torch.uint8))
        self.register_buffer("weight", (weight / weight_scale[:, None]).round().to(torch.int8).T.contiguous())  # [I, O]
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    @property
    def input_format(self) -> list[Tensor]:
        """Scale and zero point of what enters."""
        return cast(list[Tensor], [self.input_scale, self.input_zero])

    def quantize_input(self, x: Tensor) -> Tensor:
        """[..., I] float32 -> uint8."""
        return torch.onnx.ops.symbolic("QuantizeLinear", [x, *self.input_format], dtype=torch.uint8, shape=x.shape, version=13)

    def multiply(self, quantized: Tensor) -> Tensor:
        """[..., I] uint8 -> [..., O] float32."""
        inputs = [quantized, self.weight, self.input_scale, self.weight_scale, self.input_zero, None, self.bias]
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulIntegerToFloat",
            cast(list[Tensor | None], inputs),
            dtype=torch.float32,
            shape=(*quantized.shape[:-1], self.outputs),
            version=1,
        )

    def multiply_to_uint8(self, quantized: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """[N, I] uint8 -> [N, O] uint8 of that scale and zero point, by ``com.microsoft::QGemm``, which wants matrices."""
        bias_scale = cast(Tensor, self.weight_scale) * cast(Tensor, self.input_scale)
        bias = torch.zeros(self.outputs) if self.bias is None else cast(Tensor, self.bias)
        weight_zero = torch.zeros(self.outputs, dtype=torch.int8)
        operand = [self.weight, self.weight_scale, weight_zero, (bias / bias_scale).round().to(torch.int32)]
        return torch.onnx.ops.symbolic(
            "com.microsoft::QGemm",
            cast(list[Tensor], [quantized, *self.input_format, *operand, scale, zero]),
            dtype=torch.uint8,
            shape=(quantized.shape[0], self.outputs),
            version=1,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.quantize_input(x))


class Int8FeedForward(nn.Module):
    """``FeedForward`` with ReLU. Between its products the values stay uint8 with zero point 0, where saturation is the ReLU."""

    def __init__(self, trained: FeedForward) -> None:
        super().__init__()
        self.expand, self.contract = Int8Linear(trained.expand), Int8Linear(trained.contract)

    def forward(self, x: Tensor) -> Tensor:
        quantized = self.expand.quantize_input(x)
        inner = self.expand.multiply_to_uint8(quantized.flatten(0, -2), *self.contract.input_format)
        return self.contract.multiply(inner.unflatten(0, x.shape[:-1]))


def quantize(module: nn.Module) -> None:
    """Replaces every observed linear map below ``module``, but for a classifier: it is small, and last."""
    for name, child in list(module.named_children()):
        if isinstance(child, FeedForward) and child.activation is F.relu:
            setattr(module, name, Int8FeedForward(child))
        elif isinstance(child, nn.Linear):
            if hasattr(child, "input_range") and name != "classifier":
                setattr(module, name, Int8Linear(child))
        else:
            quantize(child)
