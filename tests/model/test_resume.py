"""Runs that were stopped in every unkind way, and what going on makes of them."""

import gzip
import io
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from model.checkpoint import RunError, load_run
from model.data import DataError
from model.recipe import Recipe
from model.tokenizer import Tokenizer, TokenizerError
from model.train import TrainingError, train
from model.train_log import read_log
from tests.model.corpora import parallel_recipe

QUIET = Console(quiet=True)


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    settings = ["max_updates=15", "warmup_updates=2", "evaluate_every=3", "average_last=2"]
    return parallel_recipe(folder, *(f"training.{setting}" for setting in settings), *overrides)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train(recipe_of(folder), folder / "run", console=QUIET)
    return folder / "run"


def go_on(run: Path) -> str:
    """Resumes until the end; returns what was said."""
    said = io.StringIO()
    train(recipe_of(run.parent), run, resume=True, console=Console(file=said, width=1000))
    return said.getvalue()


def curve(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in read_log(run / "log.jsonl")]


def assert_same(run: Path, straight: Path) -> None:
    """Every update, evaluation and weight, to the bit."""
    assert curve(run) == curve(straight)
    for name in ("last.safetensors", "previous.safetensors", "best.safetensors", "average.safetensors"):
        ours, theirs = load_file(run / name), load_file(straight / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


KILL = """
import os, signal, sys
from pathlib import Path
from model.recipe import load_recipe
from model.train import train

recipe, out, count, how = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
sync = os.fsync
def kill(descriptor):
    global count
    count -= 1
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = kill
train(load_recipe(recipe), out, resume=how == "resume")
"""
"""Dies by SIGKILL at the count-th sync. At an odd one, a file is written but not yet in its place."""


def test_kill_9_in_the_middle_of_a_write_changes_nothing(straight: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_of(tmp_path).to_toml(), encoding="utf-8")
    for count, how in ((31, "new"), (19, "resume")):
        command = [sys.executable, "-c", KILL, str(recipe), str(tmp_path / "run"), str(count), how]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == -signal.SIGKILL, process.stderr
    assert list((tmp_path / "run").rglob(".*.tmp"))
    assert len(curve(tmp_path / "run")) < len(curve(straight))
    go_on(tmp_path / "run")
    assert_same(tmp_path / "run", straight)
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    """In the middle of a tensor: the file stays readable."""
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)


def overwrite(path: Path) -> None:
    path.write_bytes(b"\0" * 1000)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, overwrite, Path.unlink])
def test_a_damaged_newest_checkpoint_is_passed_over(damage: Callable[[Path], object], straight: Path, tmp_path: Path) -> None:
    train(recipe_of(tmp_path, "training.max_updates=9"), tmp_path / "run", console=QUIET)
    damage(tmp_path / "run" / "last.safetensors")
    said = go_on(tmp_path / "run")
    assert_same(tmp_path / "run", straight)
    if damage is not Path.unlink:
        assert "last.safetensors: damaged" in said
        assert "going on from previous.safetensors, update 6" in said


def test_without_a_whole_checkpoint_the_run_is_refused(tmp_path: Path) -> None:
    train(recipe_of(tmp_path, "training.max_updates=6"), tmp_path / "run", console=QUIET)
    for name in ("last.safetensors", "previous.safetensors"):
        cut(tmp_path / "run" / name)
    with pytest.raises(RunError, match=r"last.safetensors: damaged: .*; .*previous.safetensors: damaged"):
        go_on(tmp_path / "run")
    for name in ("last.safetensors", "previous.safetensors"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(RunError, match=r"stopped before its first checkpoint: .*--force"):
        go_on(tmp_path / "run")


def test_missing_files_are_named_before_anything_is_computed(tmp_path: Path) -> None:
    train(recipe_of(tmp_path, "training.max_updates=3"), tmp_path / "run", console=QUIET)
    for name in ("tokenizer.json", "held_out.jsonl"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(RunError, match=r"cannot resume without tokenizer.json, held_out.jsonl"):
        train(recipe_of(tmp_path), tmp_path / "run", resume=True, console=QUIET)


def test_another_vocabulary_or_corpus_is_refused(tmp_path: Path) -> None:
    train(recipe_of(tmp_path), tmp_path / "run", console=QUIET)
    other = parallel_recipe(tmp_path, "tokenizer.vocab_size=265", "training.max_updates=1", "training.warmup_updates=0")
    train(other, tmp_path / "other", console=QUIET)
    ours = (tmp_path / "run" / "tokenizer.json").read_bytes()
    (tmp_path / "run" / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(RunError, match=r"cannot resume: tokenizer.json changed since this run began"):
        go_on(tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").write_bytes(ours)
    recipe = recipe_of(tmp_path)
    source, target = tmp_path / "train.en.gz", tmp_path / "train.de.gz"
    source.write_bytes(target.read_bytes())
    with pytest.raises(RunError, match=r"cannot resume: train.en.gz changed since this run began"):
        train(recipe, tmp_path / "run", resume=True, console=QUIET)


def lose_a_line(folder: Path) -> None:
    path = folder / "train.de.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).split(b"\n", 1)[1]))


UNKIND: dict[str, tuple[Callable[[Path], object], str]] = {
    "unequal lines": (lose_a_line, r"train.en.gz has 300 lines but .*train.de.gz has 299"),
    "no corpus": (lambda folder: (folder / "train.en.gz").unlink(), "train.en.gz: No such file or directory"),
    "no tokenizer": (lambda folder: (folder / "run" / "tokenizer.json").unlink(), "cannot resume without tokenizer.json"),
    "another vocabulary": (
        lambda folder: Tokenizer.train_characters(["a man"]).save(folder / "run" / "tokenizer.json"),
        "tokenizer.json changed since this run began",
    ),
    "no tokenizer at all": (
        lambda folder: (folder / "run" / "tokenizer.json").write_text("{"),
        "tokenizer.json: not a tokenizer",
    ),
}


@pytest.mark.parametrize("damage", UNKIND)
def test_bad_input_at_resume_leaves_the_last_checkpoint_as_it_was(damage: str, straight: Path, tmp_path: Path) -> None:
    """One line says what is wrong; put right, the run goes on as if nothing had been."""
    train(recipe_of(tmp_path, "training.max_updates=9"), tmp_path / "run", console=QUIET)
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-kept")
    recipe = recipe_of(tmp_path)
    do, problem = UNKIND[damage]
    do(tmp_path)
    with pytest.raises((RunError, DataError, TokenizerError), match=problem) as refusal:
        train(recipe, tmp_path / "run", resume=True, console=QUIET)
    assert "\n" not in str(refusal.value)
    kept = tmp_path.parent / f"{tmp_path.name}-kept"
    for name in ("last.safetensors", "previous.safetensors", "best.safetensors", "log.jsonl", "run.json"):
        assert (tmp_path / "run" / name).read_bytes() == (kept / "run" / name).read_bytes(), name
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    train(recipe, tmp_path / "run", resume=True, console=QUIET)
    assert_same(tmp_path / "run", straight)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to write further, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_training_with_the_last_checkpoint_whole(straight: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    train(recipe_of(tmp_path, "training.max_updates=6"), tmp_path / "run", console=QUIET)
    size = (tmp_path / "run" / "last.safetensors").stat().st_size
    with (
        no_file_larger_than(size // 2),
        pytest.raises(TrainingError, match=r"File too large; the checkpoint of update 6 is whole: go on with --resume"),
    ):
        train(recipe, tmp_path / "run", resume=True, console=QUIET)
    load_run(tmp_path / "run")
    go_on(tmp_path / "run")
    assert_same(tmp_path / "run", straight)
    with no_file_larger_than(size // 2), pytest.raises(TrainingError, match="nothing was saved yet"):
        train(recipe, tmp_path / "another", console=QUIET)
