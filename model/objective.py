"""What training minimises, and what validation measures, for each family."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batches import Batch, Epoch
from model.loss import cross_entropy, negative_log_likelihood
from model.transformer import Transformer


def training_loss(model: Transformer, batch: Batch, smoothing: float, dtype: torch.dtype) -> Tensor:
    """The sum over the batch's labels of the cross-entropy with smoothed labels; matrix products in ``dtype``."""
    with torch.autocast(batch.labels.device.type, dtype, enabled=dtype != torch.float32):
        if model.config.has_decoder:
            features = model.features(*batch.inputs)  # [B, T, D]
        else:
            logits = model.classify(*batch.inputs).logits  # [B, C]
    if model.config.has_decoder:
        return cross_entropy(features, model.output_weight, batch.labels, smoothing, dtype)
    assert logits is not None
    return F.cross_entropy(logits.float(), batch.labels, label_smoothing=smoothing, reduction="sum")


@torch.no_grad()
def validation_loss(model: Transformer, epoch: Epoch) -> float:
    """Mean -log p(label), in nats: in float32, without dropout or smoothing. Leaves the model in the mode it was in."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for i in range(len(epoch)):
        batch = epoch[i].to(device)
        if model.config.has_decoder:
            total += float(negative_log_likelihood(model.features(*batch.inputs), model.output_weight, batch.labels))
        else:
            logits = model.classify(*batch.inputs).logits
            assert logits is not None
            total += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        count += batch.label_count
    model.train(was_training)
    return total / count
