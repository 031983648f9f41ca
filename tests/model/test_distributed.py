"""Two processes on this machine, started as a person would start them."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from model.checkpoint import load_run
from model.distributed import World, join
from model.recipe import Recipe
from model.train import train
from model.train_log import read_log
from tests.model.corpora import labelled_recipe, parallel_recipe

QUIET = Console(quiet=True)


SHORT = (
    "training.max_updates=16",
    "training.warmup_updates=4",
    "training.evaluate_every=8",
    "training.accumulate=3",
    "training.average_last=2",
)


def in_two_processes(recipe: Recipe, folder: Path, *options: str) -> Path:
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "model", "train", str(folder / "recipe.toml"), "--out", str(folder / "two"), *options]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert process.returncode == 0, process.stderr
    return folder / "two"


def assert_same_curve(ours: Path, theirs: Path) -> None:
    """The same batches, dropout masks and updates; sums in another order, so equal to rounding."""
    two, one = (read_log(run / "log.jsonl") for run in (ours, theirs))
    assert [entry["update"] for entry in two] == [entry["update"] for entry in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key in {"loss", "gradient_norm", "validation_loss", "tokens"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (ours["update"], key)


def test_two_processes_learn_what_one_learns_with_accumulation(tmp_path: Path) -> None:
    recipe = parallel_recipe(tmp_path, *SHORT)
    train(recipe, tmp_path / "one", console=QUIET)
    assert_same_curve(in_two_processes(recipe, tmp_path), tmp_path / "one")
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {path.name for path in (tmp_path / "one").iterdir()} | {"report.html", "plots"}


@pytest.mark.parametrize("make_recipe", [parallel_recipe, labelled_recipe])
def test_two_processes_with_half_a_model_each_learn_what_one_learns(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """FSDP2. Stopped half way, one process could go on alone with the whole model, or two again with half each."""
    recipe = make_recipe(tmp_path, *SHORT, "training.metric_examples=0")
    train(recipe, tmp_path / "one", console=QUIET)
    half_way = make_recipe(
        tmp_path, *SHORT, "training.metric_examples=0", "training.parallel='sharded'", "training.max_updates=8"
    )
    in_two_processes(half_way, tmp_path)
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    sharded = make_recipe(tmp_path, *SHORT, "training.metric_examples=0", "training.parallel='sharded'")
    assert_same_curve(in_two_processes(sharded, tmp_path, "--resume"), tmp_path / "one")
    train(recipe, tmp_path / "alone", resume=True, console=QUIET)
    assert_same_curve(tmp_path / "alone", tmp_path / "one")
    ours, theirs = (load_run(tmp_path / name).model.state_dict() for name in ("two", "one"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-3)


def test_alone_nothing_is_distributed() -> None:
    with join() as world:
        assert world == World(rank=0, size=1)
        assert world.is_first
        assert world.sum(1.5, 2.0) == [1.5, 2.0]
