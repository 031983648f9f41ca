"""Every shipped recipe goes the whole path: trained on a small made-up corpus, exported, served, and called by our client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from export.build import build_bundle
from model.checkpoint import load_run
from model.decode import beam_search, score
from model.recipe import load_recipe
from model.train import train
from server.client import Options, StreamedGeneration, StreamedText, TransformerClient
from server.config import Device, EngineOptions, Precision, ServerOptions
from server.loading import load_model
from server.metrics import Metrics
from server.server import Server
from tests.model.corpora import write_lines

SMALL = ["model.d_model=32", "model.heads=2", "model.d_ff=64", "training.learning_rate=5e-3", 'training.precision="fp32"']
WORDS = {"a": "ein", "man": "mann", "dog": "hund", "runs": "rennt", "sleeps": "schläft", "here": "hier"}


def translations(root: Path) -> None:
    """In the layout of the recipe multi30k-en-de."""
    (root / "tok").mkdir()
    (root / "bpe").mkdir()
    random = Random(0)
    for part, count in (("train", 300), ("val", 40), ("test_2016_flickr", 20)):
        sentences = [random.choices(list(WORDS), k=random.randint(1, 4)) for _ in range(count)]
        write_lines(root / f"tok/{part}.lc.norm.tok.en.gz", [" ".join(words) for words in sentences])
        write_lines(root / f"tok/{part}.lc.norm.tok.de.gz", [" ".join(WORDS[word] for word in words) for words in sentences])
    write_lines(root / "bpe/en-de.codes.gz", ["#version: 0.2", "h u", "hu n", "hun d</w>", "m a", "ma n"])


def play(root: Path) -> None:
    """In the layout of the recipe tinyshakespeare."""
    random = Random(0)
    write_lines(root / "input.txt.gz", [" ".join(random.choices(list(WORDS), k=6)) for _ in range(400)])


def reviews(root: Path) -> None:
    """In the layout of the recipe sst2: good sentences hold a dog."""
    random = Random(0)
    for name, count, separator in (
        ("phrases.train.tsv", 200, "\t"),
        ("train.txt", 200, " "),
        ("dev.txt", 60, " "),
        ("test.txt", 60, " "),
    ):
        sentences = [random.choices(list(WORDS), k=random.randint(2, 6)) for _ in range(count)]
        write_lines(root / f"{name}.gz", [f"{int('dog' in words)}{separator}{' '.join(words)}" for words in sentences])


@asynccontextmanager
async def serving(bundle: Path, precision: Precision = Precision.FP32) -> AsyncIterator[TransformerClient]:
    metrics = Metrics("test")
    options = EngineOptions(device=Device.CPU, precision=precision, max_rows=8, threads=1)
    quick = ServerOptions(port=0, http_port=0, notice_seconds=0, drain_seconds=5)
    server = Server([load_model(bundle, options, metrics.step_done)], quick, metrics)
    life = asyncio.create_task(server.serve())
    while not server.serving:
        await asyncio.sleep(0.01)
        if life.done():
            life.result()
    async with TransformerClient(f"127.0.0.1:{server.port}", timeout=30) as client:
        yield client
    server.ask_to_stop()
    await life


def train_and_export(recipe: str, make: Callable[[Path], None], folder: Path, *overrides: str) -> tuple[Path, Path]:
    make(folder)
    run, bundle = folder / "run", folder / "bundle"
    train(load_recipe(recipe, [f"data.root={folder}", *SMALL, *overrides]), run, console=Console(quiet=True))
    build_bundle(run, bundle, name=recipe, precisions=("fp32", "int8"))
    return run, bundle


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
async def test_translation(tmp_path: Path, precision: Precision) -> None:
    short = ("training.max_updates=120", "training.warmup_updates=20", "training.batch_tokens=256", "training.accumulate=1")
    run_folder, bundle = train_and_export(
        "multi30k-en-de", translations, tmp_path, "model.encoder_layers=1", "model.decoder_layers=1", *short
    )
    run = load_run(run_folder)
    sources = [example["source"] for example in run.held_out]
    async with serving(bundle, precision) as client:
        results = await client.generate(sources, Options(beams=5), return_tokens=True)
    for source, result in zip(sources, results, strict=True):
        ids = run.tokenizer.encode_source(source)
        wanted = beam_search(run.model, ids, beams=5, max_tokens=run.generation["max_tokens"])[0]
        found = [token.id for token in result.hypotheses[0].tokens]
        if precision is Precision.FP32:
            assert found == wanted.tokens
            assert result.text == run.tokenizer.decode(wanted.text_tokens)
        # Eight bits may prefer another text where the trained weights find it about as good.
        assert sum(score(run.model, ids, found)) / len(found) > wanted.score - 0.2


async def test_streamed_text(tmp_path: Path) -> None:
    _, bundle = train_and_export("tinyshakespeare", play, tmp_path, "training.max_updates=150", "model.decoder_layers=1")
    async with serving(bundle) as client:
        pieces = [piece async for piece in client.stream(["a man runs here a "], Options(max_tokens=30))]
    *texts, result = pieces
    assert isinstance(result, StreamedGeneration)
    assert texts, "text comes before the result"
    assert "".join(piece.text for piece in texts if isinstance(piece, StreamedText)) == result.generation.text
    assert sum(word in WORDS for word in result.generation.text.split()) >= 3


async def test_class_probabilities(tmp_path: Path) -> None:
    _, bundle = train_and_export(
        "sst2", reviews, tmp_path, "tokenizer.vocab_size=300", "training.max_updates=150", "training.warmup_updates=20"
    )
    async with serving(bundle) as client:
        bad, good = await client.classify(["a man runs", "a dog runs here"])
    assert (bad.label, good.label) == ("negative", "positive")
    assert sum(entry.probability for entry in good.classes) == pytest.approx(1, abs=1e-5)
