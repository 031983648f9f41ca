"""The learning rate of every update."""

from __future__ import annotations

import math

from model.recipe_sections import TrainingRecipe


def learning_rate(recipe: TrainingRecipe, update: int) -> float:
    """Linear warm-up to ``recipe.learning_rate``, then the recipe's schedule. The first update is number 1."""
    peak, warmup = recipe.learning_rate, recipe.warmup_updates
    if update <= warmup:
        return peak * update / warmup
    if recipe.schedule == "inverse_sqrt":  # Vaswani et al. 2017, equation 3
        return peak * math.sqrt(max(warmup, 1) / update)
    if recipe.schedule == "cosine":  # Loshchilov & Hutter 2017, without restarts
        progress = min(1.0, (update - warmup) / max(1, recipe.max_updates - warmup))
        return recipe.final_learning_rate + (peak - recipe.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2
    return peak
