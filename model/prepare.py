"""From a recipe to what training reads: a tokenizer, examples in ids, and the examples kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from model.batches import Corpus, Example, windows
from model.data import DataError, digest, read_labelled, read_parallel, read_text
from model.recipe import Recipe
from model.tasks import HELD_OUT_PAIRS, TRAINING_PAIRS
from model.tokenizer import Tokenizer, TokenizerError

Pairs = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus
    held_out: list[dict[str, Any]]
    """As in held_out.jsonl: source and target, or source and label."""
    digests: dict[str, str]
    """sha256 of every file that was read."""
    left_out: int
    """Training examples that are empty or longer than the model's limits."""


def prepare(recipe: Recipe, tokenizer: Tokenizer | None = None) -> Prepared:
    """Raises DataError for a corpus, and TokenizerError for a tokenizer, that cannot be used.

    Args:
        tokenizer: of the run that goes on; None makes one.
    """
    if recipe.data.generator:
        return _prepare_generated(recipe, tokenizer)
    make = {"sequence_to_sequence": _prepare_pairs, "language_model": _prepare_text, "classification": _prepare_labelled}
    return make[recipe.task.kind](recipe, tokenizer)


def _prepare_generated(recipe: Recipe, tokenizer: Tokenizer | None) -> Prepared:
    make_pairs, data, seed = TRAINING_PAIRS[recipe.data.generator], recipe.data, recipe.training.seed
    held_out = list(HELD_OUT_PAIRS[data.generator](seed, data.held_out))
    if tokenizer is None:
        tokenizer = _make_tokenizer(recipe, [text for pair in make_pairs(seed, 20_000) for text in pair])
    ready = tokenizer

    def examples(epoch: int) -> list[Example]:
        # Each epoch has pairs of its own: seeds of different epochs and recipes must not meet.
        return _encode_pairs(ready, list(make_pairs(seed * 1_000_003 + epoch + 1, data.epoch_pairs)))

    validation = _encode_pairs(ready, list(HELD_OUT_PAIRS[data.generator](seed + 1, 1000)))
    return Prepared(
        tokenizer=ready,
        train=Corpus(examples=examples, kind=recipe.task.kind, batch_tokens=recipe.training.batch_tokens, seed=seed),
        validation=_corpus(recipe, validation),
        held_out=[{"source": source, "target": target} for source, target in held_out],
        digests={},
        left_out=0,
    )


def _prepare_pairs(recipe: Recipe, tokenizer: Tokenizer | None) -> Prepared:
    data = recipe.data
    train, validation = (read_parallel(*map(recipe.path, names)) for names in (data.train, data.validation))
    test = read_parallel(*map(recipe.path, data.test)) if data.test else validation
    tokenizer = tokenizer or _make_tokenizer(recipe, [text for pair in train for text in pair])
    examples = _fitting(_encode_pairs(tokenizer, train), recipe, data.train)
    return Prepared(
        tokenizer=tokenizer,
        train=_corpus(recipe, examples),
        validation=_corpus(recipe, _fitting(_encode_pairs(tokenizer, validation), recipe, data.validation)),
        held_out=[{"source": source, "target": target} for source, target in test[: data.held_out]],
        digests=_digests(recipe),
        left_out=len(train) - len(examples),
    )


def _prepare_text(recipe: Recipe, tokenizer: Tokenizer | None) -> Prepared:
    data, context = recipe.data, recipe.model.max_target_length
    text = "".join(read_text(recipe.path(name)) for name in data.train)
    if data.validation:
        validation = "".join(read_text(recipe.path(name)) for name in data.validation)
    else:
        split = int(len(text) * (1 - data.validation_fraction))
        text, validation = text[:split], text[split:]
    tokenizer = tokenizer or _make_tokenizer(recipe, [text])
    tokens, validation_tokens = tokenizer.encode_text(text), tokenizer.encode_text(validation)
    if len(tokens) <= context or len(validation_tokens) < 2:
        raise DataError(f"{', '.join(data.train)}: {len(tokens)} tokens to train on, not enough for a context of {context}")

    def examples(epoch: int) -> list[Example]:
        """Windows that begin somewhere else in every epoch."""
        return windows(tokens, context, Random(f"offset, {recipe.training.seed}, {epoch}").randrange(context))

    training = recipe.training
    return Prepared(
        tokenizer=tokenizer,
        train=Corpus(examples=examples, kind=recipe.task.kind, batch_tokens=training.batch_tokens, seed=training.seed),
        validation=_corpus(recipe, windows(validation_tokens, context)),
        held_out=_continuations(tokenizer, validation_tokens, context)[: data.held_out],
        digests=_digests(recipe),
        left_out=0,
    )


def _prepare_labelled(recipe: Recipe, tokenizer: Tokenizer | None) -> Prepared:
    data, labels = recipe.data, recipe.task.labels
    train, validation, test = (
        [example for name in names for example in read_labelled(recipe.path(name), labels)]
        for names in (data.train, data.validation, data.test)
    )
    tokenizer = tokenizer or _make_tokenizer(recipe, [text for text, _ in train])
    examples = _fitting(_encode_labelled(tokenizer, train), recipe, data.train)
    return Prepared(
        tokenizer=tokenizer,
        train=_corpus(recipe, examples),
        validation=_corpus(recipe, _fitting(_encode_labelled(tokenizer, validation), recipe, data.validation)),
        held_out=[{"source": text, "label": labels[c]} for text, c in (test or validation)[: data.held_out]],
        digests=_digests(recipe),
        left_out=len(train) - len(examples),
    )


def _corpus(recipe: Recipe, examples: list[Example]) -> Corpus:
    training = recipe.training
    return Corpus(
        examples=lambda epoch: examples, kind=recipe.task.kind, batch_tokens=training.batch_tokens, seed=training.seed
    )


def _make_tokenizer(recipe: Recipe, texts: Sequence[str]) -> Tokenizer:
    wanted = recipe.tokenizer
    if wanted.kind == "characters":
        return Tokenizer.train_characters(texts, wanted.normalization)
    if wanted.kind == "bpe":
        return Tokenizer.train_bpe(texts, wanted.vocab_size, wanted.normalization, prefix_space=wanted.prefix_space)
    path = recipe.path(wanted.codes)
    try:
        return Tokenizer.from_subword_nmt(read_text(path).split("\n"), texts)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _encode_pairs(tokenizer: Tokenizer, pairs: Pairs) -> list[Example]:
    sources = tokenizer.encode_texts([source for source, _ in pairs])
    targets = tokenizer.encode_texts([target for _, target in pairs])
    return [Example([*source, Tokenizer.EOS], target) for source, target in zip(sources, targets, strict=True)]


def _encode_labelled(tokenizer: Tokenizer, examples: list[tuple[str, int]]) -> list[Example]:
    sources = tokenizer.encode_texts([text for text, _ in examples])
    return [Example([*source, Tokenizer.EOS], [c]) for source, (_, c) in zip(sources, examples, strict=True)]


def _fitting(examples: list[Example], recipe: Recipe, names: Sequence[str]) -> list[Example]:
    """Those that are not empty on either side and fit into the model."""
    longest_source = recipe.model.max_source_length
    longest_target = (recipe.model.max_target_length or 2) - 1  # the start token takes a place
    fitting = [e for e in examples if 1 < len(e.input) <= longest_source and 1 <= len(e.output) <= longest_target]
    if not fitting:
        raise DataError(f"{', '.join(names)}: no example is neither empty nor longer than the model's limits")
    return fitting


def _continuations(tokenizer: Tokenizer, tokens: list[int], context: int) -> list[dict[str, Any]]:
    """Prompts of a quarter of the context, with the text that follows them."""
    prompt = max(1, context // 4)
    pieces = [tokens[i : i + context] for i in range(0, len(tokens) - context + 1, context)] or [tokens]
    pairs = [(tokenizer.decode(piece[:prompt]), tokenizer.decode(piece[prompt:])) for piece in pieces]
    return [{"source": s, "target": t} for s, t in pairs if s.strip() and t and "\ufffd" not in s + t]


def _digests(recipe: Recipe) -> dict[str, str]:
    names = [*recipe.data.train, *recipe.data.validation, *recipe.data.test, *filter(None, [recipe.tokenizer.codes])]
    return {name: digest(recipe.path(name)) for name in names}
