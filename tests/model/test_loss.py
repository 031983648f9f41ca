import math

import pytest
import torch
from torch.nn import functional as F

from model.batches import IGNORE
from model.loss import cross_entropy, negative_log_likelihood


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(30, 23, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (30, 23), generator=generator)
    labels[::3, 5:] = IGNORE
    return features, weight, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradients_are_those_of_pytorch(smoothing: float) -> None:
    features, weight, labels = make_inputs()
    ours = cross_entropy(features, weight, labels, smoothing, torch.float32)
    logits = (features @ weight.T).flatten(0, 1)
    theirs = F.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    gradients, expected = (torch.autograd.grad(2 * loss, (features, weight)) for loss in (ours, theirs))
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-4)


def test_bf16_is_close() -> None:
    features, weight, labels = make_inputs()
    exact = cross_entropy(features, weight, labels, 0.1, torch.float32)
    rough = cross_entropy(features, weight, labels, 0.1, torch.bfloat16)
    torch.testing.assert_close(rough, exact, rtol=5e-3, atol=0.0)
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, (features, weight))]) for loss in (exact, rough))
    assert F.cosine_similarity(a, b, dim=0) > 0.999


def test_a_label_of_no_probability_costs_much_but_not_infinity() -> None:
    features, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    loss = cross_entropy(features, weight, torch.tensor([1]), 0.0, torch.float32)
    assert math.isfinite(float(loss))
    assert float(loss) > 80


def test_validation_measures_plain_likelihood() -> None:
    features, weight, labels = make_inputs()
    log_p = (features @ weight.T).log_softmax(-1).detach()
    expected = -sum(float(log_p[i, j, labels[i, j]]) for i in range(30) for j in range(23) if labels[i, j] != IGNORE)
    assert float(negative_log_likelihood(features, weight, labels)) == pytest.approx(expected, rel=1e-5)
