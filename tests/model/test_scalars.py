from pathlib import Path

import pytest
from rich.console import Console

from model.train import train
from model.train_log import read_log
from tests.model.corpora import labelled_recipe

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_sees_what_the_log_holds_also_after_a_resume(tmp_path: Path) -> None:
    every = ["training.evaluate_every=4", "training.warmup_updates=2"]
    for updates, resume in ((6, False), (12, True)):
        recipe = labelled_recipe(tmp_path, f"training.max_updates={updates}", *every)
        train(recipe, tmp_path / "run", resume=resume, tensorboard=True, console=Console(quiet=True))
    log, seen = read_log(tmp_path / "run" / "log.jsonl"), scalars(tmp_path / "run" / "tensorboard")
    for tag, key in (("loss/training", "loss"), ("loss/validation", "validation_loss"), ("task/accuracy", "accuracy"),
                     ("training/learning_rate", "learning_rate"), ("training/gradient_norm", "gradient_norm")):  # fmt: skip
        wanted = [(entry["update"], pytest.approx(entry[key], rel=1e-5)) for entry in log if key in entry]
        assert seen[tag] == wanted
