import pytest
import torch

from model.dropout import add_dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_the_right_share_is_dropped_and_the_mean_kept(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 1001)
    y = dropout(x, p, True)
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.005)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.01)
    assert y[y != 0].unique().numel() == 1


def test_neighbours_are_dropped_independently() -> None:
    """Four masks come of one random number: no lag may show."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(1 << 18), 0.5, True) != 0).float() - 0.5
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 0.25 * 0.02


def test_a_seed_repeats_the_mask_and_the_next_call_draws_another() -> None:
    x = torch.ones(64, 33)
    torch.manual_seed(5)
    first, second = dropout(x, 0.3, True), dropout(x, 0.3, True)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.3, True), first)
    assert not torch.equal(first, second)


def test_the_residual_sum_is_the_sum_with_gradients_through_the_same_mask() -> None:
    x, y = (torch.randn(7, 5, 6, requires_grad=True) for _ in range(2))
    torch.manual_seed(1)
    result = add_dropout(x, y, 0.4, True)
    torch.manual_seed(1)
    mask = dropout(torch.ones(7, 5, 6), 0.4, True)
    torch.testing.assert_close(result, x + y * mask)
    upstream = torch.randn(7, 5, 6)
    found = torch.autograd.grad(result, (x, y), upstream)
    torch.testing.assert_close(found, (upstream, upstream * mask))


def test_a_sublayer_in_bf16_is_added_in_the_residual_s_precision() -> None:
    x, y = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    result = add_dropout(x, y, 0.25, True)
    assert result.dtype == torch.float32
    result.sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, torch.bfloat16)


def test_without_training_nothing_is_dropped() -> None:
    x = torch.randn(4, 4)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    torch.testing.assert_close(add_dropout(x, x, 0.5, False), 2 * x)
