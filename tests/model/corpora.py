"""Tiny corpora and recipes, made by code: a model learns each of them in a second or two."""

from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

from model.recipe import Recipe, read_recipe

_WORDS = {"a": "ein", "man": "mann", "dog": "hund", "runs": "rennt", "sleeps": "schläft", "here": "hier", "there": "dort"}
_MODEL = "d_model = 32\nheads = 2\nd_ff = 64\ndropout = 0.1\n"
_TRAINING = 'learning_rate = 5e-3\nwarmup_updates = 10\nprecision = "fp32"\n'


def write_lines(path: Path, lines: list[str], *, zipped: bool = True) -> None:
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)


def parallel_recipe(folder: Path, *overrides: str) -> Recipe:
    """Word-by-word translation of sentences of up to four words."""
    random = Random(0)
    for part, count in (("train", 300), ("validation", 40)):
        sentences = [random.choices(list(_WORDS), k=random.randint(1, 4)) for _ in range(count)]
        write_lines(folder / f"{part}.en.gz", [" ".join(words) for words in sentences])
        write_lines(folder / f"{part}.de.gz", [" ".join(_WORDS[word] for word in words) for words in sentences])
    return read_recipe(
        f"""
        [task]
        name = "tiny-translation"
        kind = "sequence_to_sequence"
        metric = "bleu"
        [data]
        train = ["train.en.gz", "train.de.gz"]
        validation = ["validation.en.gz", "validation.de.gz"]
        [tokenizer]
        kind = "bpe"
        vocab_size = 300
        [model]
        family = "encoder_decoder"
        encoder_layers = 1
        decoder_layers = 1
        max_source_length = 32
        max_target_length = 32
        {_MODEL}
        [training]
        max_updates = 60
        batch_tokens = 256
        {_TRAINING}
        """,
        [f"data.root={folder}", *overrides],
    )


def text_recipe(folder: Path, *overrides: str) -> Recipe:
    """A text of a few words that repeat."""
    random = Random(0)
    write_lines(folder / "text.txt", [" ".join(random.choices(list(_WORDS), k=6)) for _ in range(300)], zipped=False)
    return read_recipe(
        f"""
        [task]
        name = "tiny-text"
        kind = "language_model"
        metric = "perplexity"
        [data]
        train = ["text.txt"]
        validation_fraction = 0.1
        [tokenizer]
        kind = "characters"
        [model]
        family = "decoder_only"
        decoder_layers = 1
        max_target_length = 24
        {_MODEL}
        [training]
        max_updates = 60
        evaluate_every = 20
        batch_tokens = 384
        {_TRAINING}
        """,
        [f"data.root={folder}", *overrides],
    )


def labelled_recipe(folder: Path, *overrides: str) -> Recipe:
    """Whether a sentence speaks of a dog. One training file separates labels by a tab, the other by a space."""
    random = Random(0)

    def lines(count: int, separator: str) -> list[str]:
        sentences = [random.choices(list(_WORDS), k=random.randint(2, 6)) for _ in range(count)]
        return [f"{int('dog' in words)}{separator}{' '.join(words)}" for words in sentences]

    write_lines(folder / "phrases.tsv.gz", lines(200, "\t"))
    write_lines(folder / "train.txt", lines(200, " "), zipped=False)
    write_lines(folder / "validation.txt.gz", lines(60, " "))
    return read_recipe(
        f"""
        [task]
        name = "tiny-labels"
        kind = "classification"
        metric = "accuracy"
        labels = ["no dog", "dog"]
        [data]
        train = ["phrases.tsv.gz", "train.txt"]
        validation = ["validation.txt.gz"]
        [tokenizer]
        kind = "bpe"
        vocab_size = 300
        [model]
        family = "encoder_only"
        encoder_layers = 1
        max_source_length = 32
        {_MODEL}
        [training]
        max_updates = 80
        batch_tokens = 256
        {_TRAINING}
        """,
        [f"data.root={folder}", *overrides],
    )
