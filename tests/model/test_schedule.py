from dataclasses import replace

import pytest

from model.recipe import load_recipe
from model.schedule import learning_rate

RECIPE = replace(
    load_recipe("dates").training, learning_rate=1.0, warmup_updates=100, max_updates=1100, final_learning_rate=0.1
)


def test_warm_up_is_a_line_from_zero() -> None:
    assert [learning_rate(RECIPE, update) for update in (1, 50, 100)] == [0.01, 0.5, 1.0]


def test_inverse_square_root_halves_in_four_times_the_updates() -> None:
    recipe = replace(RECIPE, schedule="inverse_sqrt")
    assert learning_rate(recipe, 400) == 0.5
    assert learning_rate(replace(recipe, warmup_updates=0), 4) == 0.5


def test_cosine_ends_at_the_final_rate_and_stays_there() -> None:
    recipe = replace(RECIPE, schedule="cosine")
    assert learning_rate(recipe, 600) == pytest.approx(0.55)
    assert learning_rate(recipe, 1100) == pytest.approx(0.1)
    assert learning_rate(recipe, 5000) == pytest.approx(0.1)


def test_constant_is_constant() -> None:
    assert learning_rate(replace(RECIPE, schedule="constant"), 1000) == 1.0
