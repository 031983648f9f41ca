"""The served figures that ``tests.bench.parity`` compares are the trained model's, for a classifier and a language model."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.checkpoint import load_run
from model.decode import score
from tests.bench.parity import served_classes, served_log_probabilities, trained_classes
from tests.test_whole_path import play, reviews, serving, train_and_export


async def test_classes_are_served_with_the_probabilities_of_the_trained_model(tmp_path: Path) -> None:
    short = ("tokenizer.vocab_size=300", "training.max_updates=40", "training.warmup_updates=10")
    run_folder, bundle = train_and_export("sst2", reviews, tmp_path, *short)
    run = load_run(run_folder)
    texts = [example["source"] for example in run.held_out]
    async with serving(bundle) as client:
        found = await served_classes(client, texts, concurrency=4)
    for text, probabilities in zip(texts, found, strict=True):
        assert probabilities == pytest.approx(trained_classes(run, text), abs=1e-5)


async def test_continuations_are_served_with_the_log_probabilities_of_the_trained_model(tmp_path: Path) -> None:
    short = ("training.max_updates=20", "training.warmup_updates=5", "model.decoder_layers=1", "data.held_out=20")
    run_folder, bundle = train_and_export("tinyshakespeare", play, tmp_path, *short)
    run = load_run(run_folder)
    encode = run.tokenizer.encode_text
    pairs = [(encode(example["source"]), encode(example["target"])) for example in run.held_out]
    async with serving(bundle) as client:
        found = await served_log_probabilities(client, pairs, concurrency=4)
    for (prompt, continuation), log_probabilities in zip(pairs, found, strict=True):
        assert log_probabilities == pytest.approx(score(run.model, prompt, continuation), abs=1e-4)
