"""R-Drop (Liang et al. 2021): a batch is read twice under different dropout, and the two answers are asked to agree.

    loss = (CE_a + CE_b) / 2 + strength / 4 * (KL(a || b) + KL(b || a))

which is half of the paper's, so that it compares with a loss without it; ``strength`` is the paper's alpha. An update takes a
little over twice the time.

Shapes: N labelled positions, D model width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batches import IGNORE, Batch

_ROWS = {"cpu": 256, "cuda": 4096}
"""Rows of logits that exist at a time, of each reading."""


def twice(batch: Batch) -> Batch:
    """The same rows two times: dropout falls differently on each."""
    return Batch(tuple(torch.cat([x, x]) for x in batch.inputs), batch.labels)


def consistent_class_loss(logits: Tensor, labels: Tensor, smoothing: float, strength: float) -> Tensor:
    """The sum over the labels [N] of the loss above. ``logits`` [2 N, C] are of both readings."""
    a, b = logits.log_softmax(-1).chunk(2)  # [N, C]
    cross_entropy = F.cross_entropy(logits, labels.repeat(2), label_smoothing=smoothing, reduction="sum") / 2
    divergence = ((a.exp() - b.exp()) * (a - b)).sum()
    return cross_entropy + strength / 4 * divergence


def consistent_cross_entropy(
    features: Tensor, weight: Tensor, labels: Tensor, smoothing: float, strength: float, dtype: torch.dtype
) -> Tensor:
    """The sum over labelled positions of the loss above, fused with the output matrix as ``model.loss.cross_entropy``.

    Args:
        features: [2 B, T, D], both readings.
        weight: [V, D]; logits are ``features @ weight.T``.
        labels: [B, T], IGNORE where there is no label.
        dtype: of the matrix products; sums are in float32.
    """
    keep = labels != IGNORE
    a, b = (half[keep] for half in features.chunk(2))  # [N, D]
    loss: Tensor = _FusedConsistency.apply(a, b, weight, labels[keep], smoothing, strength, dtype)
    return loss


class _FusedConsistency(torch.autograd.Function):
    """Loss and gradients in one pass over a few rows of logits at a time.

    With p, q the two distributions, d the difference of their logits, and E_p, E_q expectations: KL(p || q) + KL(q || p) is
    E_p[d] - E_q[d], and its gradient for p's logits is p (d - E_p[d]) + p - q. Normalising the logits would only shift d.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, weight: Tensor, labels: Tensor, smoothing: float, strength: float, dtype: torch.dtype
    ) -> Tensor:
        w, mean_weight = weight.to(dtype), weight.mean(0)  # [V, D], [D]
        halves = [half.to(dtype) for half in (a, b)]
        gradients = [torch.empty_like(half) for half in halves]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        loss, pull = torch.zeros((), device=a.device), strength / 4
        for i in range(0, len(labels), _ROWS[a.device.type]):
            rows = slice(i, i + _ROWS[a.device.type])
            y = labels[rows, None]  # [n, 1]
            logits = [half[rows] @ w.T for half in halves]  # [n, V]
            p, q = (z.softmax(1) for z in logits)
            for half, z, r in zip(halves, logits, (p, q), strict=True):
                nll = -r.gather(1, y).float().clamp_min(torch.finfo(torch.float32).tiny).log()[:, 0]
                mean_logit = half[rows].float() @ mean_weight
                loss += (nll + smoothing * (z.gather(1, y)[:, 0].float() - mean_logit)).sum() / 2
            d = logits[0].sub_(logits[1])
            in_p, in_q = ((r * d).sum(1, keepdim=True, dtype=torch.float32) for r in (p, q))  # [n, 1]
            loss += pull * (in_p - in_q).sum()
            apart = (p - q).mul_(pull)
            # d (half the cross-entropy + pull * divergence) / d logits, but for the target distribution
            grad_p = (d - (in_p - 0.5 / pull).to(dtype)).mul_(p).mul_(pull).add_(apart)
            grad_q = (d - (in_q + 0.5 / pull).to(dtype)).mul_(q).mul_(-pull).sub_(apart)
            for half, gradient, g in zip(halves, gradients, (grad_p, grad_q), strict=True):
                torch.matmul(g, w, out=gradient[rows])
                grad_weight += g.T @ half[rows]
        target = (1.0 - smoothing) * F.embedding(labels, weight) + smoothing * mean_weight
        for half in halves:
            grad_weight.index_add_(0, labels, half.float(), alpha=-(1.0 - smoothing) / 2)
            grad_weight -= smoothing / len(weight) * half.float().sum(0) / 2
        grad_a, grad_b = ((gradient.float() - target / 2).to(a.dtype) for gradient in gradients)
        ctx.save_for_backward(grad_a, grad_b, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        grad_a, grad_b, grad_weight = ctx.saved_tensors
        return grad_a * scale, grad_b * scale, grad_weight * scale, None, None, None, None
