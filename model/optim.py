"""The optimiser of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model.recipe_sections import TrainingRecipe


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for all else; the first group is Muon's.

    Muon's steps are scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so that one learning rate and one weight
    decay serve both.
    """

    def __init__(self, inside: list[nn.Parameter], rest: list[dict[str, Any]], recipe: TrainingRecipe) -> None:
        muon = torch.optim.Muon(
            inside, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._muon, self._adamw = muon, adamw
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Raises TypeError for a closure: the trainer has none."""
        if closure is not None:
            raise TypeError("no closure: two optimisers would call it twice")
        self._muon.step()
        self._adamw.step()

    def _share(self) -> None:
        """Both work on what this one shows, saves and loads."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state


def make_optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """Weight decay pulls on the matrices of linear maps alone: not on biases, norms, embeddings and positions."""
    inside, classifier, free = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not name.endswith(".weight"):
            free.append(parameter)
        else:
            (classifier if name.startswith("classifier.") else inside).append(parameter)
    undecayed = {"params": free, "weight_decay": 0.0}
    if recipe.optimizer == "muon":
        return MuonWithAdamW(inside, [{"params": classifier, "weight_decay": recipe.weight_decay}, undecayed], recipe)
    groups = [{"params": inside + classifier, "weight_decay": recipe.weight_decay}, undecayed]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)
