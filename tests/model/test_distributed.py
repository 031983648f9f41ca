"""Two processes on this machine, started as a person would start them."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from model.distributed import World, join
from model.train import train
from model.train_log import read_log
from tests.model.corpora import parallel_recipe


def test_two_processes_learn_what_one_learns_with_accumulation(tmp_path: Path) -> None:
    """The same batches, dropout masks and updates; sums in another order, so equal to rounding."""
    recipe = parallel_recipe(
        tmp_path, "training.max_updates=16", "training.evaluate_every=8", "training.accumulate=3", "training.average_last=2"
    )
    train(recipe, tmp_path / "one", console=Console(quiet=True))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "model", "train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "two")]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert process.returncode == 0, process.stderr
    one, two = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [entry["update"] for entry in two] == [entry["update"] for entry in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key in {"loss", "gradient_norm", "validation_loss", "tokens"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (ours["update"], key)
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {path.name for path in (tmp_path / "one").iterdir()} | {"report.html", "plots"}


def test_alone_nothing_is_distributed() -> None:
    with join() as world:
        assert world == World(rank=0, size=1)
        assert world.is_first
        assert world.sum(1.5, 2.0) == [1.5, 2.0]
