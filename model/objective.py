"""What training minimises, and what validation measures, for each family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batches import Batch, Epoch
from model.consistency import consistent_class_loss, consistent_cross_entropy, twice
from model.distributed import World
from model.loss import cross_entropy, negative_log_likelihood
from model.transformer import Transformer


class TrainingLoss(nn.Module):
    """The sum over a batch's labels of the cross-entropy with smoothed labels; matrix products in ``dtype``.

    Args:
        consistency: above 0, each batch is read twice and the readings are pulled together: see ``model.consistency``.
    """

    def __init__(self, model: Transformer, smoothing: float, dtype: torch.dtype, consistency: float = 0.0) -> None:
        super().__init__()
        self.model, self.smoothing, self.dtype, self.consistency = model, smoothing, dtype, consistency

    def forward(self, batch: Batch) -> Tensor:
        model, dtype, labels = self.model, self.dtype, batch.labels
        inputs = twice(batch).inputs if self.consistency else batch.inputs
        with torch.autocast(labels.device.type, dtype, enabled=dtype != torch.float32):
            if model.config.has_decoder:
                features = model.features(*inputs)  # [B, T, D]
            else:
                logits = model.classify(*inputs).logits  # [B, C]
        if model.config.has_decoder:
            weight = model.output_weight
            if self.consistency:
                return consistent_cross_entropy(features, weight, labels, self.smoothing, self.consistency, dtype)
            return cross_entropy(features, weight, labels, self.smoothing, dtype)
        assert logits is not None
        if self.consistency:
            return consistent_class_loss(logits.float(), labels, self.smoothing, self.consistency)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing, reduction="sum")


@dataclass(frozen=True, slots=True)
class Validation:
    loss: float
    """Mean -log p(label), in nats: in float32, without dropout or smoothing."""
    error: float | None = None
    """The share of texts whose most probable class is the wrong one."""

    def rank(self) -> list[float]:
        """The lower, the better. Classes are compared by errors first: a classifier's loss rises while it still learns."""
        return [self.loss] if self.error is None else [self.error, self.loss]


@torch.no_grad()
def validate(model: Transformer, epoch: Epoch, world: World | None = None) -> Validation:
    """Leaves the model in the mode it was in. The processes of ``world`` share the batches, and all get the result."""
    world = world or World()
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    loss, wrong, count = 0.0, 0, 0
    for first in range(0, len(epoch), world.size):
        mine = first + world.rank
        batch = epoch[min(mine, len(epoch) - 1)].to(device)  # sharded layers come together only if every process computes
        batch_loss, batch_wrong = _measure(model, batch)
        if mine < len(epoch):
            loss, wrong, count = loss + batch_loss, wrong + batch_wrong, count + epoch.label_count(mine)
    model.train(was_training)
    all_loss, all_wrong, all_count = world.sum(loss, wrong, count)
    return Validation(all_loss / all_count, None if model.config.has_decoder else all_wrong / all_count)


def _measure(model: Transformer, batch: Batch) -> tuple[float, int]:
    """The summed loss of a batch, and how many of its texts are classified wrongly."""
    if model.config.has_decoder:
        features = model.features(*batch.inputs)
        return float(negative_log_likelihood(features, model.output_weight, batch.labels)), 0
    logits = model.classify(*batch.inputs).logits
    assert logits is not None
    wrong = int((logits.argmax(-1) != batch.labels).sum())
    return float(F.cross_entropy(logits, batch.labels, reduction="sum")), wrong
