"""The optimiser of a recipe."""

from __future__ import annotations

import torch
from torch import nn

from model.recipe_sections import TrainingRecipe


def make_optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Weight decay pulls on the matrices of linear maps alone: not on biases, norms, embeddings and positions."""
    decayed, free = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and name.endswith(".weight")
        (decayed if is_matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)
