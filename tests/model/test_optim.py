from dataclasses import replace

import pytest
import torch

from model.optim import make_optimizer
from model.recipe import load_recipe
from model.transformer import Transformer

RECIPE = load_recipe("tinyshakespeare")


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_recipe_chooses_the_optimizer(name: str, kind: type) -> None:
    model = Transformer(RECIPE.model_config(70))
    assert type(make_optimizer(model, replace(RECIPE.training, optimizer=name))) is kind


def test_weight_decay_pulls_on_matrices_of_linear_maps_alone() -> None:
    model = Transformer(RECIPE.model_config(70))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, free = make_optimizer(model, RECIPE.training).param_groups
    assert decayed["weight_decay"] == RECIPE.training.weight_decay > 0.0
    assert free["weight_decay"] == 0.0
    assert all("norm" not in names[p] and names[p].endswith("weight") and p.dim() == 2 for p in decayed["params"])
    assert {names[p] for p in free["params"] if "norm" not in names[p]} == {"embedding", "decoder_embedding.positions"}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
