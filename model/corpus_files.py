"""What is made of a corpus and kept beside it: the tokenizer, the examples in ids, and the words for BPE-dropout.

Everything is found again by a checksum of what it was made from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from model.batches import Corpus, Example
from model.bpe_dropout import DroppedMerges, Segmenter, TextInWords, number_words
from model.data import DataError, read_text
from model.packed import PackedExamples, PackedFiles, pack
from model.recipe import Recipe
from model.tokenizer import Tokenizer, TokenizerError

FORMAT = 1
"""Raised when the same recipe gives other ids of the same corpus: what was kept before is not looked at then."""


@dataclass(frozen=True, slots=True)
class CorpusFiles:
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
            return make_tokenizer(recipe, list(texts())).to_json()

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


def make_tokenizer(recipe: Recipe, texts: Sequence[str]) -> Tokenizer:
    """Raises TokenizerError for merges that cannot be used."""
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
