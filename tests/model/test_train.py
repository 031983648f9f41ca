"""Real trainings, a second or two each, through the same door as the command line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import model.trainer
from model.checkpoint import Run, RunError, load_run
from model.data import DataError, digest
from model.prepare import prepare
from model.recipe import Recipe, load_recipe
from model.train import TrainingError, train
from tests.model.corpora import labelled_recipe, parallel_recipe, text_recipe

QUIET = Console(quiet=True)


def losses(out: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(entry["update"], entry["loss"]) for entry in entries if "loss" in entry]


def crash_at(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine goes down in the middle of an update."""
    rate = model.trainer.learning_rate

    def crash(recipe: object, next_update: int) -> float:
        if next_update == update:
            raise KeyboardInterrupt
        return rate(recipe, next_update)  # type: ignore[arg-type]

    monkeypatch.setattr(model.trainer, "learning_rate", crash)


@pytest.mark.parametrize(
    ("make_recipe", "metric", "at_least"),
    [(parallel_recipe, "bleu", 40.0), (labelled_recipe, "accuracy", 85.0), (text_recipe, "perplexity", None)],
)
def test_each_kind_of_task_is_learned(
    make_recipe: Callable[..., Recipe], metric: str, at_least: float | None, tmp_path: Path
) -> None:
    run = train(make_recipe(tmp_path, "training.max_updates=250"), tmp_path / "run", console=QUIET)
    curve = losses(tmp_path / "run")
    assert curve[-1][1] < 0.6 * curve[0][1]
    value = run.provenance["metrics"][metric]
    assert value >= at_least if at_least else 1.0 < value < 3.0
    check_run_directory(tmp_path / "run", run)


def check_run_directory(out: Path, run: Run) -> None:
    names = {path.name for path in out.iterdir()}
    assert names == {"recipe.toml", "run.json", "tokenizer.json", "best.safetensors", "last.safetensors", "held_out.jsonl",
                     "calibration.jsonl", "log.jsonl", "previous.safetensors", "prepared"}  # fmt: skip
    assert run.task["kind"] and run.generation["max_tokens"] == 256
    assert run.held_out and set(run.held_out[0]) in ({"source", "target"}, {"source", "label"})
    assert run.calibration and set(run.calibration[0]) == {"input", "output"}
    provenance = run.provenance
    assert provenance["updates"] == len(losses(out))
    assert provenance["precision"] == "fp32"
    assert all(len(digest) == 64 for digest in provenance["data"].values())
    assert not run.model.training


def test_a_task_without_files_is_trained(tmp_path: Path) -> None:
    overrides = ["training.max_updates=3", "training.warmup_updates=2", "data.epoch_pairs=300", "data.held_out=20"]
    recipe = load_recipe("dates", overrides)
    run = train(recipe, tmp_path / "run", console=QUIET)
    assert run.tokenizer.decode(run.tokenizer.encode_text("3. März 2026")) == "3. März 2026"
    assert len(run.held_out) == 20


@pytest.mark.parametrize(
    ("make_recipe", "overrides"),
    [(parallel_recipe, []), (text_recipe, []), (labelled_recipe, []), (parallel_recipe, ["data.bpe_dropout=0.2"])],
)
def test_a_crashed_run_goes_on_bit_for_bit(
    make_recipe: Callable[..., Recipe], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved in the middle of an epoch, stopped two updates later: the same curve and weights as without the crash."""
    more = ["training.max_updates=13", "training.evaluate_every=5", "training.accumulate=2"]
    recipe = make_recipe(tmp_path, *overrides, *more)
    train(recipe, tmp_path / "straight", console=QUIET)
    with monkeypatch.context() as patch:
        crash_at(8, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "crashed", console=QUIET)
    assert len(losses(tmp_path / "crashed")) == 7
    torch.manual_seed(999)
    train(recipe, tmp_path / "crashed", resume=True, console=QUIET)
    assert losses(tmp_path / "crashed") == losses(tmp_path / "straight")
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(tmp_path / "crashed" / name), load_file(tmp_path / "straight" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    train(parallel_recipe(tmp_path, "training.max_updates=12"), tmp_path / "straight", console=QUIET)
    train(parallel_recipe(tmp_path, "training.max_updates=10"), tmp_path / "longer", console=QUIET)
    train(parallel_recipe(tmp_path, "training.max_updates=12"), tmp_path / "longer", resume=True, console=QUIET)
    assert losses(tmp_path / "longer") == losses(tmp_path / "straight")


def test_a_run_may_begin_where_another_ended(tmp_path: Path) -> None:
    first = train(parallel_recipe(tmp_path), tmp_path / "first", console=QUIET)
    onward = ["training.max_updates=4", "training.warmup_updates=0", "training.learning_rate=1e-4", "model.dropout=0.0"]
    recipe = parallel_recipe(tmp_path, f"training.start_from={tmp_path / 'first'}", *onward)
    second = train(recipe, tmp_path / "second", console=QUIET)
    assert losses(tmp_path / "second")[0][1] < 0.7 * losses(tmp_path / "first")[0][1]
    assert digest(tmp_path / "second" / "tokenizer.json") == digest(tmp_path / "first" / "tokenizer.json")
    assert second.provenance["started_from"] == digest(tmp_path / "first" / "best.safetensors")
    assert second.provenance["validation_loss"] <= 1.1 * first.provenance["validation_loss"]


def test_a_run_does_not_begin_with_another_network(tmp_path: Path) -> None:
    train(parallel_recipe(tmp_path, "training.max_updates=2", "training.warmup_updates=0"), tmp_path / "first", console=QUIET)
    recipe = parallel_recipe(tmp_path, f"training.start_from={tmp_path / 'first'}", "model.heads=4", 'model.norm="pre"')
    with pytest.raises(RunError, match=r"first: cannot start .* model.heads is 4 here and 2 there; model.norm is 'pre' here"):
        train(recipe, tmp_path / "second", console=QUIET)
    assert not (tmp_path / "second").exists()


def test_another_recipe_cannot_resume(tmp_path: Path) -> None:
    train(text_recipe(tmp_path, "training.max_updates=10"), tmp_path / "run", console=QUIET)
    changed = text_recipe(tmp_path, "training.max_updates=12", "training.learning_rate=1", "model.d_ff=128")
    with pytest.raises(RunError, match=r"cannot resume with another model.d_ff, training.learning_rate"):
        train(changed, tmp_path / "run", resume=True, console=QUIET)
    with pytest.raises(RunError, match="nothing to resume"):
        train(changed, tmp_path / "nowhere", resume=True, console=QUIET)


def test_the_average_of_the_last_evaluations_is_the_result_where_the_recipe_says_so(tmp_path: Path) -> None:
    recipe = parallel_recipe(tmp_path, "training.evaluate_every=10", "training.average_last=3", "training.max_updates=50")
    run = train(recipe, tmp_path / "run", console=QUIET)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [f"{update:08}.safetensors" for update in (30, 40, 50)]
    assert run.provenance["weights"] == "average.safetensors"
    weights = [load_file(path)["embedding"] for path in checkpoints]
    torch.testing.assert_close(run.model.embedding.data, sum(weights) / 3)


def test_training_stops_when_it_gets_no_better(tmp_path: Path) -> None:
    recipe = text_recipe(
        tmp_path, "training.patience=2", "training.evaluate_every=2", "training.learning_rate=1e-12", "training.max_updates=40"
    )
    train(recipe, tmp_path / "run", console=QUIET)
    assert len(losses(tmp_path / "run")) < 40


@pytest.mark.parametrize(("limit", "epochs"), [("max_epochs=2", 2), ("max_minutes=1e-9", 0)])
def test_training_stops_at_its_limits(limit: str, epochs: int, tmp_path: Path) -> None:
    recipe = labelled_recipe(tmp_path, f"training.{limit}")
    train(recipe, tmp_path / "run", console=QUIET)
    assert len(losses(tmp_path / "run")) == (epochs * len(prepare(recipe).train.epoch(0)) or 1)


def test_a_loss_that_is_no_number_stops_training_and_spares_the_checkpoint(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path, "training.evaluate_every=5", "training.max_updates=40", "training.warmup_updates=0")
    out = tmp_path / "run"
    calls = 0

    def rate(settings: object, update: int) -> float:
        nonlocal calls
        calls += 1
        return 1e-3 if update <= 5 else 1e38

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.trainer, "learning_rate", rate)
        with pytest.raises(TrainingError, match=r"at update \d+ .*lower training.learning_rate"):
            train(recipe, out, console=QUIET)
    run = load_run(out)
    assert all(bool(tensor.isfinite().all()) for tensor in run.model.state_dict().values())
    assert run.provenance["updates"] == 5


def test_an_existing_directory_is_replaced_only_on_purpose(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path, "training.max_updates=1", "training.warmup_updates=0")
    train(recipe, tmp_path / "run", console=QUIET)
    with pytest.raises(RunError, match=r"exists: go on with --resume, or replace it with --force"):
        train(recipe, tmp_path / "run", console=QUIET)
    (tmp_path / "run" / "average.safetensors").touch()
    train(recipe, tmp_path / "run", force=True, console=QUIET)
    assert not (tmp_path / "run" / "average.safetensors").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").touch()
    with pytest.raises(RunError, match="not a run"):
        train(recipe, tmp_path / "precious", force=True, console=QUIET)
    with pytest.raises(RunError, match="is a file"):
        train(recipe, tmp_path / "precious" / "thesis.txt", console=QUIET)


@pytest.mark.parametrize("name", ["train.de.gz", "validation.de.gz"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x1f\x8b damaged", "de.gz: damaged gzip"),
        (gzip.compress(b"ein mann\n"), r"en.gz has \d+ lines but .*de.gz has 1"),
        (gzip.compress(b"\xff\n"), "de.gz: line 1 is not UTF-8"),
    ],
)
def test_damaged_data_leaves_no_run_behind(content: bytes, problem: str, name: str, tmp_path: Path) -> None:
    recipe = parallel_recipe(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        train(recipe, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_bf16_learns_too(tmp_path: Path) -> None:
    run = train(labelled_recipe(tmp_path, "training.precision='bf16'"), tmp_path / "run", console=QUIET)
    assert run.provenance["precision"] == "bf16"
    curve = losses(tmp_path / "run")
    assert curve[-1][1] < 0.6 * curve[0][1]
