from dataclasses import replace

import pytest
import torch

from model.optim import MuonWithAdamW, make_optimizer
from model.progress import optimizer_tensors, restore_optimizer
from model.recipe import load_recipe
from model.transformer import Transformer

RECIPE = load_recipe("tinyshakespeare")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("muon", MuonWithAdamW)],
)
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


def test_muon_is_for_the_matrices_inside_the_layers_alone() -> None:
    recipe = load_recipe("sst2", ["training.optimizer='muon'", "training.weight_decay=0.1"])
    model = Transformer(recipe.model_config(70))
    names = {parameter: name for name, parameter in model.named_parameters()}
    inside, classifier, free = (group["params"] for group in make_optimizer(model, recipe.training).param_groups)
    assert {names[p] for p in classifier} == {"classifier.weight"}
    assert {names[p] for p in inside} == {
        name for name, p in model.named_parameters() if ".layers." in name and name.endswith("weight") and p.dim() == 2
    }
    assert len(inside) + len(classifier) + len(free) == len(names)


def test_a_step_is_muons_on_matrices_inside_and_adamws_on_all_else() -> None:
    """Muon's step goes equally far in each direction that the gradient has: no direction dominates, as one does in AdamW's."""
    training = replace(RECIPE.training, optimizer="muon", learning_rate=1e-3, weight_decay=0.0)
    torch.manual_seed(1)
    model, beside = (Transformer(RECIPE.model_config(70)) for _ in range(2))
    beside.load_state_dict(model.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(70, (2, 8))
    for one, name in ((model, "muon"), (beside, "adamw")):
        one.logits(one.features(tokens)).square().mean().backward()
        make_optimizer(one, replace(training, optimizer=name)).step()
    for (name, ours), adamws in zip(model.named_parameters(), beside.parameters(), strict=True):
        if ours.dim() < 2 or ".layers." not in name:
            assert torch.equal(ours, adamws), name
            continue
        size = 0.2 * max(ours.shape) ** 0.5 * 1e-3
        farthest, adamws_farthest = (
            float(torch.linalg.matrix_norm(p.detach() - before[name], 2)) / size for p in (ours, adamws)
        )
        assert 0.7 < farthest < 1.3 < 5.0 < adamws_farthest, name


def test_muon_goes_on_from_a_checkpoint_to_the_bit() -> None:
    """The loss is the mean of squared logits, so that there is something to learn."""
    training = replace(RECIPE.training, optimizer="muon", learning_rate=1e-3)
    torch.manual_seed(1)
    model = Transformer(RECIPE.model_config(70))
    tokens = torch.randint(70, (2, 8))

    def update(model: Transformer, optimizer: torch.optim.Optimizer) -> float:
        loss = model.logits(model.features(tokens)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    optimizer = make_optimizer(model, training)
    losses = [update(model, optimizer) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    again = Transformer(RECIPE.model_config(70))
    again.load_state_dict(model.state_dict())
    resumed = make_optimizer(again, training)
    restore_optimizer(resumed, {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()})
    for group in [*optimizer.param_groups, *resumed.param_groups]:
        group["lr"] = 5e-4  # as the schedule sets it
    for _ in range(3):
        assert update(model, optimizer) == update(again, resumed)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
