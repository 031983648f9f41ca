"""The reference attention against PyTorch's own, and what masks and rotary positions promise.

Shapes as in ``model.attention``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import MultiHeadAttention, attention, causal_mask, padding_mask, rotary_table, rotate
from tests import tiny

CPU = torch.device("cpu")


def random_qkv(heads: int = 4, kv_heads: int = 4, queries: int = 5, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(3, heads, queries, 8, dtype=torch.float64)
    k, v = (torch.randn(3, kv_heads, keys, 8, dtype=torch.float64) for _ in range(2))
    return q, k, v


def random_mask(queries: int, keys: int) -> Tensor:
    mask = torch.rand(3, 4, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True  # a query that may look nowhere has no answer
    return mask


MASKS = {
    "none": lambda t, s: None,
    "causal": lambda t, s: causal_mask(t, s, CPU),
    "ragged padding": lambda t, s: padding_mask(torch.tensor([1, s, s - 1]), s),
    "causal and ragged padding": lambda t, s: causal_mask(t, s, CPU) & padding_mask(torch.tensor([1, s, s - 1]), s),
    "any": random_mask,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 8)])
def test_attention_is_scaled_dot_product_attention(mask: str, kv_heads: int, queries: int, keys: int) -> None:
    q, k, v = random_qkv(4, kv_heads, queries, keys)
    allowed = MASKS[mask](queries, keys)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=kv_heads != 4)
    torch.testing.assert_close(attention(q, k, v, allowed), wanted, rtol=0, atol=1e-12)


def test_attention_by_hand() -> None:
    q = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]]]])
    k = torch.tensor([[[[math.log(3.0), 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]]]])
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    # Scores 2 log 3 / sqrt(4) and 0, so weights 3 : 1.
    torch.testing.assert_close(attention(q, k, v), torch.tensor([[[[0.75, 0.25]]]]))


def test_dropout_removes_weights_and_scales_the_others_up() -> None:
    q, k, _ = random_qkv(queries=40, keys=10)
    v = torch.eye(10, dtype=torch.float64).expand(3, 4, 10, 10)  # so that the output is the weights
    whole = attention(q, k, v)
    torch.manual_seed(0)
    dropped = attention(q, k, v, dropout=0.25)
    gone = dropped == 0
    torch.testing.assert_close(dropped[~gone], whole[~gone] / 0.75)
    assert 0.2 < gone.double().mean() < 0.3


@pytest.mark.parametrize("mask", ["causal", "ragged padding", "any"])
def test_what_is_masked_cannot_be_seen(mask: str) -> None:
    q, k, v = random_qkv()
    allowed = MASKS[mask](5, 5).expand(3, 4, 5, 5)
    for query in range(5):
        hidden = ~allowed[:, :, query, :, None]
        changed = attention(q, k.masked_fill(hidden, 1e6), v.masked_fill(hidden, 1e6), allowed)
        assert torch.equal(changed[:, :, query], attention(q, k, v, allowed)[:, :, query])


def test_causal_mask_counts_keys_from_the_last_query() -> None:
    assert causal_mask(3, 3, CPU).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 4, CPU).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(1, 4, CPU).all()


def test_padding_mask_shows_the_first_positions_of_each_row() -> None:
    mask = padding_mask(torch.tensor([3, 1, 4]), 4)
    assert mask.shape == (3, 1, 1, 4)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_rotation_is_a_product_of_complex_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 8)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    frequencies = torch.tensor([10_000 ** (-2 * i / 8) for i in range(4)])
    turned = pairs * torch.polar(torch.ones(7, 4), torch.arange(7.0)[:, None] * frequencies)
    torch.testing.assert_close(rotate(x, *rotary_table(7, 8)), torch.cat([turned.real, turned.imag], dim=-1))


def test_rotated_products_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    cos, sin = rotary_table(64, 16)

    def product(m: int, n: int) -> Tensor:
        def at(x: Tensor, position: int) -> Tensor:
            here = slice(position, position + 1)
            return rotate(x[None, None, None], cos[here], sin[here]).flatten()

        return at(q, m) @ at(k, n)

    for distance in (0, 1, 5, -7):
        found = torch.stack([product(10 + shift + distance, 10 + shift) for shift in range(0, 40, 8)])
        torch.testing.assert_close(found, found[:1].expand(5), rtol=0, atol=1e-5)
    assert abs(product(10, 10) - q @ k) < 1e-5
    assert abs(product(15, 10) - product(10, 15)) > 0.1  # forwards is not backwards


def multi_head(kv_heads: int | None = None) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(tiny.shape("encoder_decoder", kv_heads=kv_heads)).eval()


def torch_multi_head(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    """PyTorch's, with the same weights; grouped heads repeated."""
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    repeat = ours.heads // ours.kv_heads

    def repeated(x: Tensor) -> Tensor:
        return x.unflatten(0, (ours.kv_heads, ours.width)).repeat_interleave(repeat, dim=0).flatten(0, 1)

    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, repeated(ours.key.weight), repeated(ours.value.weight)]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, repeated(ours.key.bias), repeated(ours.value.bias)]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    return theirs


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_multi_head_attention_is_pytorchs(kv_heads: int | None) -> None:
    ours = multi_head(kv_heads)
    x, memory, lengths = torch.randn(3, 6, 32), torch.randn(3, 9, 32), torch.tensor([9, 4, 1])
    mask = padding_mask(lengths, 9)
    found = ours(x, ours.keys_values(memory), mask)
    wanted, _ = torch_multi_head(ours)(x, memory, memory, key_padding_mask=~mask[:, 0, 0], need_weights=False)
    torch.testing.assert_close(found, wanted)


def test_keys_computed_piece_by_piece_carry_their_positions() -> None:
    ours, x = multi_head(), torch.randn(2, 7, 32)
    cos, sin = rotary_table(7, 8)
    whole = ours.keys_values(x, (cos, sin))
    pieces = [ours.keys_values(x[:, part], (cos[part], sin[part])) for part in (slice(0, 3), slice(3, 7))]
    for i in range(2):
        torch.testing.assert_close(torch.cat([piece[i] for piece in pieces], dim=2), whole[i])
