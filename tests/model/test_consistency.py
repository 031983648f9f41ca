import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.batches import IGNORE, Batch
from model.consistency import consistent_class_loss, consistent_cross_entropy, twice


def by_the_paper(logits: Tensor, labels: Tensor, smoothing: float, strength: float) -> Tensor:
    """Half of equation 4, from library functions."""
    a, b = logits.chunk(2)
    cross_entropy = sum(F.cross_entropy(z, labels, label_smoothing=smoothing, reduction="sum") for z in (a, b))
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    divergence = F.kl_div(log_a, log_b, log_target=True, reduction="sum") + F.kl_div(
        log_b, log_a, log_target=True, reduction="sum"
    )
    return cross_entropy / 2 + strength / 4 * divergence


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("strength", [0.5, 5.0])
def test_value_and_gradients_are_those_of_the_paper(smoothing: float, strength: float) -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(2 * 31, 11, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (31, 11))  # more rows than are computed at a time
    labels[3, 5:] = IGNORE
    keep = labels != IGNORE
    wanted = by_the_paper(torch.cat([h[keep] for h in features.chunk(2)]) @ weight.T, labels[keep], smoothing, strength)
    found = consistent_cross_entropy(features, weight, labels, smoothing, strength, torch.float32)
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(3 * loss, (features, weight)) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_in_bf16_it_is_close() -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(2 * 4, 40, 32) * 0.5, torch.randn(300, 32) * 0.3
    features.requires_grad_()
    labels = torch.randint(0, 300, (4, 40))
    losses = [consistent_cross_entropy(features, weight, labels, 0.1, 5.0, dtype) for dtype in (torch.float32, torch.bfloat16)]
    exact, rounded = (torch.autograd.grad(loss, features)[0] for loss in losses)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    assert float(F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)) > 0.999


def test_classes_as_well() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2 * 6, 3, requires_grad=True), torch.randint(0, 3, (6,))
    wanted, found = by_the_paper(logits, labels, 0.1, 5.0), consistent_class_loss(logits, labels, 0.1, 5.0)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)))


def test_a_batch_twice_is_two_readings_of_the_same_rows() -> None:
    batch = twice(Batch((torch.arange(6).view(2, 3), torch.tensor([3, 2])), torch.tensor([1, 0])))
    assert [x.tolist() for x in batch.inputs] == [[[0, 1, 2], [3, 4, 5]] * 2, [3, 2, 3, 2]]
    assert batch.labels.tolist() == [1, 0]
