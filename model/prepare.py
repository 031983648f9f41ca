"""From a recipe to what training reads: a tokenizer, examples in ids, and the examples kept apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.batches import Corpus, Example, Windows
from model.bpe_dropout import DroppedMerges, Segmenter, TextInWords, number_words
from model.data import DataError, digest, read_labelled, read_parallel, read_text
from model.packed import PackedExamples, PackedFiles, pack
from model.recipe import Recipe
from model.tasks import HELD_OUT_PAIRS, TRAINING_PAIRS
from model.tokenizer import Tokenizer, TokenizerError

FORMAT = 1
"""Raised when this module makes other ids of the same corpus: what was kept before is not looked at then."""

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
    return make[recipe.task.kind](_Files(recipe, _digests(recipe), PackedFiles(folder) if folder else None), tokenizer)


@dataclass(frozen=True, slots=True)
class _Files:
    """The corpus of a recipe, and where what is made from it is kept."""

    recipe: Recipe
    digests: dict[str, str]
    kept: PackedFiles | None

    def tokenizer(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Made from the training files' texts."""
        recipe = self.recipe
        names = [*recipe.data.train, *filter(None, [recipe.tokenizer.codes])]
        origin = asdict(recipe.tokenizer) | self._origin(names)
        if recipe.data.bpe_dropout:
            origin["every_piece"] = True

        def make() -> str:
            return _make_tokenizer(recipe, list(texts())).to_json()

        return Tokenizer.from_json(self.kept.text(origin, make) if self.kept else make())

    def examples(
        self, tokenizer: Tokenizer, names: Sequence[str], part: str, make: Callable[[], list[Example]]
    ) -> PackedExamples:
        """The examples that ``make`` encodes from the files ``names``.

        Args:
            part: what else distinguishes them from others of the same files.
        """
        if not self.kept:
            return pack(make())
        return self.kept.examples(self._origin(names) | {"tokenizer": tokenizer.to_json(), "part": part}, make)

    def fitting(self, tokenizer: Tokenizer, names: Sequence[str], make: Callable[[], list[Example]]) -> PackedExamples:
        """Those that are not empty on either side and fit into the model."""
        examples, model = self.examples(tokenizer, names, "all", make), self.recipe.model
        inputs, outputs = examples.lengths().T  # [N] each
        longest_output = (model.max_target_length or 2) - 1  # the start token takes a place
        keep = (inputs > 1) & (inputs <= model.max_source_length) & (outputs >= 1) & (outputs <= longest_output)
        if not keep.any():
            raise DataError(f"{', '.join(names)}: no example is neither empty nor longer than the model's limits")
        return examples.only(keep)

    def epochs(
        self, tokenizer: Tokenizer, names: Sequence[str], plain: PackedExamples, split: Callable[[], Iterable[TextInWords]]
    ) -> Callable[[int], PackedExamples]:
        """What each epoch reads: always ``plain``, or with dropped merges what ``split`` gives of the same files."""
        data, model = self.recipe.data, self.recipe.model
        if not data.bpe_dropout:
            return lambda epoch: plain

        @cache
        def numbered() -> tuple[list[str], list[Example]]:
            return number_words(split())

        def make_words() -> str:
            return json.dumps(numbered()[0])

        origin = self._origin(names) | {"tokenizer": tokenizer.to_json(), "part": "words"}
        words = json.loads(self.kept.text(origin, make_words) if self.kept else make_words())
        corpus = self.examples(tokenizer, names, "words", lambda: numbered()[1])
        of_text = self.recipe.task.kind == "language_model"  # one example, of any length
        return DroppedMerges(
            segmenter=Segmenter(tokenizer, words),
            corpus=PackedExamples(corpus.ids, corpus.ends, plain.rows),
            longest=(math.inf, math.inf) if of_text else (model.max_source_length, (model.max_target_length or 2) - 1),
            rate=data.bpe_dropout,
            seed=self.recipe.training.seed,
        )

    def corpus(self, examples: Callable[[int], Sequence[Example]]) -> Corpus:
        recipe = self.recipe
        return Corpus(
            examples=examples, kind=recipe.task.kind, batch_tokens=recipe.training.batch_tokens, seed=recipe.training.seed
        )

    def _origin(self, names: Sequence[str]) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "format": FORMAT,
            "kind": recipe.task.kind,
            "labels": recipe.task.labels,
            "validation_fraction": recipe.data.validation_fraction,
            "files": [self.digests[name] for name in names],
        }


def _prepare_generated(recipe: Recipe, tokenizer: Tokenizer | None) -> Prepared:
    make_pairs, data, seed = TRAINING_PAIRS[recipe.data.generator], recipe.data, recipe.training.seed
    held_out = list(HELD_OUT_PAIRS[data.generator](seed, data.held_out))
    if tokenizer is None:
        tokenizer = _make_tokenizer(recipe, [text for pair in make_pairs(seed, 20_000) for text in pair])
    ready, files = tokenizer, _Files(recipe, {}, None)

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


def _prepare_pairs(files: _Files, known: Tokenizer | None) -> Prepared:
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


def _prepare_text(files: _Files, known: Tokenizer | None) -> Prepared:
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


def _prepare_labelled(files: _Files, known: Tokenizer | None) -> Prepared:
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


def _make_tokenizer(recipe: Recipe, texts: Sequence[str]) -> Tokenizer:
    wanted = recipe.tokenizer
    if wanted.kind == "characters":
        return Tokenizer.train_characters(texts, wanted.normalization)
    if wanted.kind == "bpe":
        return Tokenizer.train_bpe(texts, wanted.vocab_size, wanted.normalization, prefix_space=wanted.prefix_space)
    path = recipe.path(wanted.codes)
    try:
        every_piece = recipe.data.bpe_dropout > 0
        return Tokenizer.from_subword_nmt(read_text(path).split("\n"), texts, every_piece=every_piece)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


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
