"""A shortlist holds what the corpus shows, the graphs compute nothing else, and what it costs stands in the certificate."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from export.__main__ import app
from export.build import ExportError, build_bundle
from export.bundle import BundleError, describe_files, open_bundle
from export.graph_runner import BOS, SequenceGraphs
from export.shortlist import find_shortlist, restrict, shortlist_cost
from model.checkpoint import RunError, load_run
from model.config import ModelConfig
from model.data import read_lines
from model.decode import greedy
from model.train import train
from tests import tiny
from tests.model.corpora import parallel_recipe, write_lines

LARGE = tiny.shape("encoder_decoder", vocab_size=8300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose targets have few of the vocabulary's words; its corpus lies beside it."""
    folder = tmp_path_factory.mktemp("shortlist")
    (folder / "corpus").mkdir()
    train(parallel_recipe(folder / "corpus"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Path:
    build_bundle(trained, trained.with_name("bundle"), name="short", shortlist_count=1)
    return trained.with_name("bundle")


def some_tokens(config: ModelConfig, count: int) -> tuple[int, ...]:
    rng = random.Random(2)
    return tuple(sorted([0, 1, 2, 3, *rng.sample(range(4, config.vocab_size), count - 4)]))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("config", "count"),
    [(tiny.shape("encoder_decoder"), 17), (LARGE, 5000), (LARGE, 8295)],
    ids=["without blocks", "small blocks", "blocks"],
)
def test_the_graph_computes_the_shortlist_and_nothing_else(config: ModelConfig, count: int, precision: str) -> None:
    shortlist = some_tokens(config, count)
    whole = SequenceGraphs(tiny.graphs(config, precision=precision), config)
    short = SequenceGraphs(tiny.graphs(config, precision=precision, shortlist=shortlist), config, shortlist)
    rng = random.Random(0)
    inputs = [tiny.token_ids(rng, n, config.vocab_size) for n in (3, 20, 9)]
    targets = [tiny.token_ids(rng, n, config.vocab_size) for n in (8, 2, 15)]
    for all_logits, logits in zip(whole.forced(inputs, targets), short.forced(inputs, targets), strict=True):
        np.testing.assert_allclose(logits, all_logits[:, list(shortlist)], atol=1e-5)
    short.start(inputs)
    best, logits = short.step(np.full(3, BOS), np.zeros(3, np.int64))
    assert best.tolist() == np.array(shortlist)[logits.argmax(axis=1)].tolist()
    (log_p,) = (o.shape for o in short.decoder.get_outputs() if o.name == "logits")
    assert log_p[1] < count + 128


def test_greedy_outputs_are_the_restricted_models() -> None:
    config = tiny.shape("encoder_decoder")
    shortlist = some_tokens(config, 25)
    graphs = SequenceGraphs(tiny.graphs(config, shortlist=shortlist), config, shortlist)
    rng = random.Random(1)
    inputs = [tiny.token_ids(rng, rng.randint(1, 20)) for _ in range(30)]
    restricted = restrict(tiny.model(config), shortlist)
    found = graphs.greedy(inputs, 15)
    assert found == [greedy(restricted, ids, 15).text_tokens for ids in inputs]
    assert found != [greedy(tiny.model(config), ids, 15).text_tokens for ids in inputs]


def test_restricting_leaves_the_model_as_it_was() -> None:
    model = tiny.model(tiny.shape("encoder_decoder"))
    states = torch.randn(2, model.config.d_model)
    before = model.logits(states)
    after = restrict(model, [2, 5]).logits(states)
    assert torch.equal(model.logits(states), before)
    assert torch.equal(after[:, [2, 5]], before[:, [2, 5]])
    assert torch.isneginf(after).sum() == 2 * (model.config.vocab_size - 2)


def test_it_holds_what_targets_show_often_enough_and_all_that_spells(trained: Path) -> None:
    run = load_run(trained)
    every, often = (set(find_shortlist(trained, run, least)) for least in (1, 150))
    sources, targets = (
        {
            token
            for ids in run.tokenizer.encode_texts(read_lines(trained.with_name("corpus") / f"train.{side}.gz"))
            for token in ids
        }
        for side in ("en", "de")
    )
    assert targets <= every
    assert {"<s>", "</s>", "<unk>", "<pad>", "x", "Ń"} <= set(run.tokenizer.pieces(every)), "bytes nobody wrote, too"
    assert {piece for piece in run.tokenizer.pieces(sources - every) if len(piece) > 1}, "words of the sources are out"
    assert often < every


def test_a_bundle_has_it_and_says_what_it_costs(bundle: Path, trained: Path) -> None:
    run, opened = load_run(trained), open_bundle(bundle)
    ids = opened.shortlist()
    assert ids == find_shortlist(trained, run, 1)
    cost = opened.manifest.certificate["fp32"]["shortlist"]
    assert cost == shortlist_cost(run, ids)
    assert (cost["tokens"], cost["vocabulary"]) == (len(ids), run.config.vocab_size)
    assert cost["loss"] == cost["whole"] - cost["shortlist"] <= 0.1
    assert cost["inputs"] == len(run.held_out)
    assert opened.manifest.certificate["fp32"]["stages"][0]["max_logit_difference"] < 1e-4


def test_a_shortlist_that_costs_too_much_becomes_no_bundle(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the shortlist takes bleu \(greedy\) from \d+\.\d+ to \d+\.\d+"):
        build_bundle(trained, tmp_path / "bundle", name="short", shortlist_count=150)
    assert not (tmp_path / "bundle").exists()


def test_it_is_made_from_the_corpus_of_the_training(trained: Path, tmp_path: Path) -> None:
    corpus = trained.with_name("corpus")
    shutil.copy(corpus / "train.de.gz", tmp_path)
    try:
        write_lines(corpus / "train.de.gz", ["ein"] * 300)
        with pytest.raises(RunError, match=r"but train\.de\.gz changed since then"):
            find_shortlist(trained, load_run(trained), 1)
        (corpus / "train.de.gz").unlink()
        with pytest.raises(RunError, match=r"made from the training corpus: .*train\.de\.gz: No such file"):
            find_shortlist(trained, load_run(trained), 1)
    finally:
        shutil.copy(tmp_path / "train.de.gz", corpus)


def test_only_encoder_decoders_have_one(bundles: dict[str, Path], tmp_path: Path) -> None:
    run = bundles["decoder_only"].with_suffix(".run")
    found = CliRunner().invoke(app, [str(run), str(tmp_path / "bundle"), "--shortlist", "1"])
    assert found.exit_code == 2
    assert "a shortlist is for encoder-decoders, not for decoder_only" in found.output


@pytest.mark.parametrize("content", ["[", "{}", "[]", "[4, 3]", "[3, 3]", "[-1, 2]", "[2, 100000]", "[2.0, 3]", "[true, 3]"])
def test_a_damaged_list_is_refused(bundle: Path, tmp_path: Path, content: str) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "shortlist.json").write_text(content)
    with pytest.raises(BundleError, match=r"shortlist\.json: damaged"):
        open_bundle(copy)
    opened = open_bundle(bundle)
    opened.manifest.files.update(describe_files(copy))
    with pytest.raises(BundleError, match=r"shortlist\.json: (not JSON|must be rising ids)"):
        type(opened)(copy, opened.manifest, "").shortlist()
