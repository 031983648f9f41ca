"""The command line, as a shell sees it."""

import json
import sys
from pathlib import Path

import pytest

from model.__main__ import main
from tests.model.corpora import parallel_recipe


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["python -m model", *map(str, arguments)])
        main()
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def test_train_then_evaluate_then_describe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(parallel_recipe(tmp_path).to_toml(), encoding="utf-8")
    run = tmp_path / "run"
    short = ["--set", "training.max_updates=5", "--set", "training.warmup_updates=2"]
    code, _, err = call(capsys, "train", recipe, *short, "--out", run)
    assert code == 0, err
    assert "validation loss" in err
    code, out, _ = call(capsys, "evaluate", run, "--json")
    assert code == 0
    assert set(json.loads(out)) == {"exact_match", "bleu", "chrf"}
    code, out, _ = call(capsys, "evaluate", run)
    assert code == 0
    assert "chrf" in out
    code, out, _ = call(capsys, "evaluate", run, "--against", run, "--json")
    assert code == 0
    assert json.loads(out)["bleu"]["p"] == 1.0
    code, out, _ = call(capsys, "evaluate", run, "--against", run)
    assert code == 0
    assert "difference" in out
    (run / "report.html").unlink()  # written at the end of training
    code, out, _ = call(capsys, "report", run)
    assert code == 0
    assert out.strip() == str(run / "report.html")
    assert (run / "report.html").exists()
    code, out, _ = call(capsys, "describe", run, "--json")
    assert code == 0
    assert json.loads(out)["model"]["vocab_size"] == 300


def test_describe_gpt3(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "describe", "gpt3")
    assert code == 0
    assert "57,982,058,496" in out
    assert "175,181,291,520" in out


@pytest.mark.parametrize(("recipe", "vocabulary"), [("dates", None), ("sst2", 8000), ("tinyshakespeare", 1)])
def test_describe_a_recipe(recipe: str, vocabulary: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "describe", recipe, "--json")
    assert code == 0
    assert json.loads(out)["model"]["vocab_size"] == vocabulary or vocabulary is None
    assert ("--vocab-size" in err) == (vocabulary == 1)
    code, out, _ = call(capsys, "describe", recipe, "--vocab-size", 1000, "--json")
    assert json.loads(out)["parts"]["embedding"]["matrices"] == 128 * 1000


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["train", "dates", "--out", "{}/run", "--set", "model.heads=3"],
            "error: model.d_model (128) must be divisible",
        ),
        (["train", "nothing", "--out", "{}/run"], "error: nothing: No such file or directory (shipped recipes: dates"),
        (["train", "sst2", "--out", "{}/run"], "error: phrases.train.tsv.gz: No such file or directory"),
        (["train", "dates", "--out", "{}/run", "--resume"], "recipe.toml: No such file or directory: nothing to resume"),
        (["train", "dates", "--out", "{}/run", "--resume", "--force"], "--resume and --force exclude each other"),
        (["train", "dates", "--out", "{}/run", "--fast"], "No such option: --fast"),
        (["evaluate", "{}"], "run.json: No such file or directory"),
        (["describe", "gpt5"], "error: 'gpt5' is no run, recipe file or one of transformer-base"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *(argument.format(tmp_path) for argument in arguments))
    assert code == 2
    assert problem in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "run").exists()
    if err.startswith("error:"):
        assert err.count("\n") == 1


def test_every_problem_of_a_recipe_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "train", "dates", "--out", tmp_path / "run", "--set", "model.depth=3", "--set", "task.kind='x'")
    assert code == 2
    assert [line.startswith("error: ") for line in err.splitlines()] == [True, True]
