"""From a recipe to what training reads: a tokenizer, examples in ids, and the examples kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.batches import Corpus, Example, Windows
from model.bpe_dropout import TextInWords
from model.corpus_files import CorpusFiles, make_tokenizer
from model.data import DataError, digest, read_labelled, read_parallel, read_text
from model.packed import PackedExamples, PackedFiles
from model.recipe import Recipe
from model.tasks import HELD_OUT_PAIRS, TRAINING_PAIRS
from model.tokenizer import Tokenizer

Pairs = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    tokenizer: Tokenizer
    train: Corpus
    plain: Callable[[], Sequence[Example]]
    """The training examples as the trained model will read such texts: segmented without dropout."""
    validation: Corpus
    held_out: list[dict[str, Any]]
    """As in held_out.jsonl: source and target, or source and label."""
    digests: dict[str, str]
    """sha256 of every file that was read."""
    left_out: int
    """Training examples that are empty or longer than the model's limits."""


def prepare(recipe: Recipe, tokenizer: Tokenizer | None = None, folder: Path | None = None) -> Prepared:
    """Raises DataError for a corpus, and TokenizerError for a tokenizer, that cannot be used.

    Args:
        tokenizer: of the run that goes on; None makes one.
        folder: where tokenizer and examples are kept, and found again the next time; None keeps them in memory alone.
    """
    if recipe.data.generator:
        return _prepare_generated(recipe, tokenizer)
    make = {"sequence_to_sequence": _prepare_pairs, "language_model": _prepare_text, "classification": _prepare_labelled}
    return make[recipe.task.kind](CorpusFiles(recipe, _digests(recipe), PackedFiles(folder) if folder else None), tokenizer)


def _prepare_generated(recipe: Recipe, tokenizer: Tokenizer | None) -> Prepared:
    make_pairs, data, seed = TRAINING_PAIRS[recipe.data.generator], recipe.data, recipe.training.seed
    held_out = list(HELD_OUT_PAIRS[data.generator](seed, data.held_out))
    if tokenizer is None:
        tokenizer = make_tokenizer(recipe, [text for pair in make_pairs(seed, 20_000) for text in pair])
    ready, files = tokenizer, CorpusFiles(recipe, {}, None)

    def examples(epoch: int) -> list[Example]:
        # Each epoch has pairs of its own: seeds of different epochs and recipes must not meet.
        return _encode_pairs(ready, list(make_pairs(seed * 1_000_003 + epoch + 1, data.epoch_pairs)))

    validation = _encode_pairs(ready, list(HELD_OUT_PAIRS[data.generator](seed + 1, 1000)))
    return Prepared(
        tokenizer=ready,
        train=files.corpus(examples),
        plain=lambda: examples(0),
        validation=files.corpus(lambda epoch: validation),
        held_out=[{"source": source, "target": target} for source, target in held_out],
        digests={},
        left_out=0,
    )


def _prepare_pairs(files: CorpusFiles, known: Tokenizer | None) -> Prepared:
    recipe, data = files.recipe, files.recipe.data

    @cache
    def read(names: tuple[str, ...]) -> Pairs:
        return read_parallel(*map(recipe.path, names))

    tokenizer = known or files.tokenizer(lambda: (text for pair in read(data.train) for text in pair))

    def fitting(names: tuple[str, ...]) -> PackedExamples:
        return files.fitting(tokenizer, names, lambda: _encode_pairs(tokenizer, read(names)))

    train, validation = fitting(data.train), fitting(data.validation)
    epochs = files.epochs(tokenizer, data.train, train, lambda: _split_pairs(tokenizer, read(data.train)))
    return Prepared(
        tokenizer=tokenizer,
        train=files.corpus(epochs),
        plain=lambda: train,
        validation=files.corpus(lambda epoch: validation),
        held_out=[{"source": s, "target": t} for s, t in read(data.test or data.validation)[: data.held_out]],
        digests=files.digests,
        left_out=len(train.ends) - len(train),
    )


def _prepare_text(files: CorpusFiles, known: Tokenizer | None) -> Prepared:
    recipe, data = files.recipe, files.recipe.data
    context = recipe.model.max_target_length

    @cache
    def read() -> tuple[str, str]:
        """To train on, and to validate."""
        text = "".join(read_text(recipe.path(name)) for name in data.train)
        if data.validation:
            return text, "".join(read_text(recipe.path(name)) for name in data.validation)
        split = int(len(text) * (1 - data.validation_fraction))
        return text[:split], text[split:]

    tokenizer = known or files.tokenizer(lambda: read()[:1])

    names = [*data.train, *data.validation]

    def encoded(part: int) -> PackedExamples:
        return files.examples(tokenizer, names, str(part), lambda: [Example(tokenizer.encode_text(read()[part]), [])])

    train = encoded(0)
    tokens, validation_tokens = train.ids, encoded(1).ids
    if len(tokens) <= context or len(validation_tokens) < 2:
        raise DataError(f"{', '.join(data.train)}: {len(tokens)} tokens to train on, not enough for a context of {context}")

    epochs = files.epochs(tokenizer, names, train, lambda: [(tokenizer.words(read()[0]), [])])

    def windows(tokens: NDArray[np.int32], epoch: int) -> Windows:
        """They begin somewhere else in every epoch."""
        return Windows(tokens, context, Random(f"offset, {recipe.training.seed}, {epoch}").randrange(context))

    return Prepared(
        tokenizer=tokenizer,
        train=files.corpus(lambda epoch: windows(epochs(epoch).ids, epoch)),
        plain=lambda: windows(tokens, 0),
        validation=files.corpus(lambda epoch: Windows(validation_tokens, context)),
        held_out=_continuations(tokenizer, validation_tokens, context, data.held_out),
        digests=files.digests,
        left_out=0,
    )


def _prepare_labelled(files: CorpusFiles, known: Tokenizer | None) -> Prepared:
    recipe, data, labels = files.recipe, files.recipe.data, files.recipe.task.labels

    @cache
    def read(names: tuple[str, ...]) -> list[tuple[str, int]]:
        return [example for name in names for example in read_labelled(recipe.path(name), labels)]

    tokenizer = known or files.tokenizer(lambda: (text for text, _ in read(data.train)))

    def fitting(names: tuple[str, ...]) -> PackedExamples:
        return files.fitting(tokenizer, names, lambda: _encode_labelled(tokenizer, read(names)))

    train, validation = fitting(data.train), fitting(data.validation)
    epochs = files.epochs(tokenizer, data.train, train, lambda: _split_labelled(tokenizer, read(data.train)))
    return Prepared(
        tokenizer=tokenizer,
        train=files.corpus(epochs),
        plain=lambda: train,
        validation=files.corpus(lambda epoch: validation),
        held_out=[{"source": s, "label": labels[c]} for s, c in read(data.test or data.validation)[: data.held_out]],
        digests=files.digests,
        left_out=len(train.ends) - len(train),
    )


def _encode_pairs(tokenizer: Tokenizer, pairs: Pairs) -> list[Example]:
    sources = tokenizer.encode_texts([source for source, _ in pairs])
    targets = tokenizer.encode_texts([target for _, target in pairs])
    return [Example([*source, Tokenizer.EOS], target) for source, target in zip(sources, targets, strict=True)]


def _encode_labelled(tokenizer: Tokenizer, examples: list[tuple[str, int]]) -> list[Example]:
    sources = tokenizer.encode_texts([text for text, _ in examples])
    return [Example([*source, Tokenizer.EOS], [c]) for source, (_, c) in zip(sources, examples, strict=True)]


def _split_pairs(tokenizer: Tokenizer, pairs: Pairs) -> list[TextInWords]:
    return [([*tokenizer.words(source), Tokenizer.EOS], tokenizer.words(target)) for source, target in pairs]


def _split_labelled(tokenizer: Tokenizer, examples: list[tuple[str, int]]) -> list[TextInWords]:
    return [([*tokenizer.words(text), Tokenizer.EOS], [c]) for text, c in examples]


def _continuations(tokenizer: Tokenizer, tokens: NDArray[np.int32], context: int, count: int) -> list[dict[str, Any]]:
    """At most ``count`` prompts of a quarter of the context, with the text that follows them."""
    prompt, found = max(1, context // 4), list[dict[str, Any]]()
    for start in range(0, max(1, len(tokens) - context + 1), context):
        piece = tokens[start : start + context].tolist()
        source, target = tokenizer.decode(piece[:prompt]), tokenizer.decode(piece[prompt:])
        if source.strip() and target and "\ufffd" not in source + target:
            found.append({"source": source, "target": target})
        if len(found) == count:
            break
    return found


def _digests(recipe: Recipe) -> dict[str, str]:
    names = [*recipe.data.train, *recipe.data.validation, *recipe.data.test, *filter(None, [recipe.tokenizer.codes])]
    try:
        return {name: digest(recipe.path(name)) for name in names}
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
