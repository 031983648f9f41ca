import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from model.alignment import cross_attention_weights
from model.checkpoint import RunError, load_run
from model.recipe import Recipe
from model.report import write_report
from model.tokenizer import Tokenizer
from model.train import train
from tests.model.corpora import labelled_recipe, parallel_recipe, text_recipe

SHORT = ["training.max_updates=12", "training.evaluate_every=4"]


@pytest.mark.parametrize(
    ("make_recipe", "pictures"), [(parallel_recipe, 5), (text_recipe, 4), (labelled_recipe, 4)], ids=["pairs", "text", "labels"]
)
def test_every_kind_of_run_has_its_page(make_recipe: Callable[..., Recipe], pictures: int, tmp_path: Path) -> None:
    run = train(make_recipe(tmp_path, *SHORT), tmp_path / "run", console=Console(quiet=True))
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,iVBOR') == pictures
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing outside the file"
    assert "Stopped: max_updates." in page
    assert f"{run.provenance['validation_loss']:.4f}" in page
    answer = "label" if run.task["kind"] == "classification" else "target"
    assert run.held_out[0]["source"].split()[0] in page
    assert run.held_out[0][answer].split()[0] in page
    names = {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    assert {"loss.png", "metric.png", "learning_rate.png", "gradient_norm.png"} <= names


def test_markup_in_a_sample_stays_text(tmp_path: Path) -> None:
    train(labelled_recipe(tmp_path, *SHORT), tmp_path / "run", console=Console(quiet=True))
    held_out = tmp_path / "run" / "held_out.jsonl"
    held_out.write_text('{"source": "<script>alert(1)</script>", "label": "dog"}\n', encoding="utf-8")
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_a_run_without_an_update_has_nothing_to_report(tmp_path: Path) -> None:
    train(text_recipe(tmp_path, *SHORT), tmp_path / "run", console=Console(quiet=True))
    (tmp_path / "run" / "log.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"log.jsonl: no update in it"):
        write_report(tmp_path / "run")


def test_cross_attention_is_a_distribution_that_depends_on_its_prefix_alone(tmp_path: Path) -> None:
    recipe = parallel_recipe(tmp_path, "model.decoder_layers=2", "model.kv_heads=1", "training.max_updates=100")
    train(recipe, tmp_path / "run", console=Console(quiet=True))
    run = load_run(tmp_path / "run")
    source = run.tokenizer.encode_source("a man sleeps here")
    target = [Tokenizer.BOS, *run.tokenizer.encode_text("ein mann schläft hier")]
    weights = cross_attention_weights(run.model, source, target)
    assert weights.shape == (2, 2, len(target), len(source))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, len(target)))
    shorter = cross_attention_weights(run.model, source, target[:2])
    torch.testing.assert_close(weights[:, :, :2], shorter)
    assert not run.model.decoder.layers[0].cross_attention._forward_pre_hooks
