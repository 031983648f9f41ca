import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from model.checkpoint import RunError, average_weights, load_run, save_weights
from model.files import write_text
from model.train import train
from tests.model.corpora import text_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(text_recipe(folder, "training.max_updates=10"), folder / "run", console=Console(quiet=True))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change_weights(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(run / "best.safetensors")
    change(weights)
    save_file(weights, run / "best.safetensors")


def change_record(run: Path, change: Callable[[dict], object]) -> None:
    record = json.loads((run / "run.json").read_text())
    change(record)
    (run / "run.json").write_text(json.dumps(record))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda run: (run / "run.json").unlink(), r"run.json: No such file"),
    "cut record": (lambda run: (run / "run.json").write_text('{"format'), r"run.json: not JSON"),
    "other format": (lambda run: change_record(run, lambda r: r.update(format_version=9)), "not a run of format version 1"),
    "list as record": (lambda run: (run / "run.json").write_text("[]"), "not a run of format version 1"),
    "part missing": (lambda run: change_record(run, lambda r: r.pop("task")), "run.json: task is missing"),
    "impossible model": (
        lambda run: change_record(run, lambda r: r["model"].update(heads=5)),
        "d_model .32. must be",
    ),
    "unknown key": (lambda run: change_record(run, lambda r: r["model"].update(width=5)), "unknown key width"),
    "other vocabulary": (lambda run: change_record(run, lambda r: r["model"].update(vocab_size=5)), "tokenizer of .* beside"),
    "no weights": (lambda run: (run / "best.safetensors").unlink(), "best.safetensors: No such file"),
    "cut weights": (
        lambda run: (run / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:-9]),
        "best.safetensors: damaged",
    ),
    "missing tensor": (lambda run: change_weights(run, lambda w: w.pop("embedding")), "embedding is missing"),
    "extra tensor": (lambda run: change_weights(run, lambda w: w.update(x=torch.ones(1))), "x is not part of the model"),
    "other shape": (lambda run: change_weights(run, lambda w: w.update(embedding=torch.ones(2, 3))), r"shape \[2, 3\]"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
    "no held-out": (lambda run: (run / "held_out.jsonl").unlink(), "held_out.jsonl: No such file"),
    "no calibration": (lambda run: (run / "calibration.jsonl").unlink(), "calibration.jsonl: No such file"),
    "no section": (lambda run: change_record(run, lambda r: r.update(generation=3)), "generation must be a section, not 3"),
    "cut held-out": (lambda run: (run / "held_out.jsonl").write_text('{"source'), "held_out.jsonl"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_in_one_line(damage: str, run: Path) -> None:
    do, problem = DAMAGES[damage]
    do(run)
    with pytest.raises(RunError, match=problem) as refusal:
        load_run(run)
    assert str(run) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_average_is_preferred(run: Path) -> None:
    assert load_run(run).provenance["weights"] == "best.safetensors"
    change_weights(run, lambda weights: weights["embedding"].fill_(0.5))
    (run / "best.safetensors").rename(run / "average.safetensors")
    loaded = load_run(run)
    assert loaded.provenance["weights"] == "average.safetensors"
    assert bool((loaded.model.embedding == 0.5).all())


def test_averages_are_means(tmp_path: Path) -> None:
    for i in range(3):
        save_weights({"w": torch.full((2, 2), float(i))}, tmp_path / f"{i}")
    assert torch.equal(average_weights([tmp_path / f"{i}" for i in range(3)])["w"], torch.ones(2, 2))


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights({"w": torch.ones(2)}, path)
    before = path.read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights({"w": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
