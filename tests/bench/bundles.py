"""Whole bundles of the measured shapes, for what is measured with a server or an engine process in front of the model."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch

from export.build import build_bundle
from model.checkpoint import save_weights, write_record
from model.files import write_json_lines
from model.tokenizer import SPECIAL_TOKENS, Tokenizer
from model.transformer import Transformer
from tests.bench.natural import FIRST, natural_length
from tests.bench.shapes import BUILD, SHAPES

_FIRST_LETTER = 0x3400
"""Of the made-up alphabet: one letter for each id, from here on in Unicode's order."""


def shape_bundle(shape: str) -> Path:
    """A bundle of SHAPES[shape], fp32, made once; remove it after a change of the export.

    Its weights are those of a model that has not learnt anything yet, so the length of an output must be asked for.
    """
    bundle, config = BUILD / shape / "bundle", SHAPES[shape]
    if (bundle / "manifest.json").exists():
        return bundle
    torch.manual_seed(0)
    model = Transformer(config).eval()
    tokenizer = Tokenizer.train_characters(letters(config.vocab_size - len(SPECIAL_TOKENS)))
    rng = random.Random(0)

    def text() -> list[int]:
        return [rng.randrange(FIRST, config.vocab_size) for _ in range(natural_length(rng))]

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        task = {"name": shape, "kind": "sequence_to_sequence", "metric": "exact_match", "labels": []}
        write_record(run, config, task, {"beams": 1, "length_penalty": 1.0, "max_tokens": 64}, {"seed": 0})
        save_weights(model.state_dict(), run / "best.safetensors")
        tokenizer.save(run / "tokenizer.json")
        pairs = [{"source": tokenizer.decode(text()), "target": tokenizer.decode(text())} for _ in range(8)]
        write_json_lines(run / "held_out.jsonl", pairs)
        write_json_lines(run / "calibration.jsonl", [])
        build_bundle(run, bundle, name=shape, precisions=["fp32"])
    return bundle


def shape_texts(shape: str, count: int, seed: int) -> list[str]:
    """Texts for ``shape_bundle(shape)``, of natural lengths."""
    rng, alphabet = random.Random(seed), letters(SHAPES[shape].vocab_size - len(SPECIAL_TOKENS))
    return ["".join(rng.choices(alphabet, k=natural_length(rng))) for _ in range(count)]


def letters(count: int) -> str:
    """So many different characters that are letters of some script."""
    found = filter(str.isalpha, map(chr, range(_FIRST_LETTER, 0x110000)))
    return "".join(letter for letter, _ in zip(found, range(count), strict=False))
