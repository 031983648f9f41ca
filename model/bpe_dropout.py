"""BPE-dropout (Provilkov, Emelianenko and Voita 2020): a training text is segmented anew for every epoch, with merges left out.

BPE merges the letters of a word step by step, each time the pair that was learnt first. With dropout each pair that could be
merged is left out of a step with a certain probability, and the first of the others is merged; a step in which all are left out
is the last one. The `tokenizers` library has the same dropout, but draws from a generator that cannot be seeded; here seed and
epoch alone decide, so that a training can be stopped anywhere and go on.

A word on its way is a *state*, the tuple of its pieces. States and the steps between them are found once and then looked up, so
that an epoch is a few array operations over all words of a corpus.

Shapes: N examples, W words of all of them (and ids that are none), L ids of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.batches import Example
from model.packed import PackedExamples
from model.tokenizer import Tokenizer, TokenizerError

_MOST_STATES = 1_000_000
"""Kept from one epoch to the next, at about 400 bytes each."""

Indices = NDArray[np.int64]
TextInWords = tuple[Sequence[str | int], Sequence[str | int]]
"""An example whose texts are words, as ``Tokenizer.words`` gives them; an int is an id that is no part of any text."""


def number_words(examples: Iterable[TextInWords]) -> tuple[list[str], list[Example]]:
    """The distinct words, and each example with a word's number in place of it, and -1 - id for an id."""
    examples = list(examples)
    words = sorted({item for sides in examples for side in sides for item in side if isinstance(item, str)})
    number = {word: i for i, word in enumerate(words)}

    def numbered(side: Sequence[str | int]) -> list[int]:
        return [number[item] if isinstance(item, str) else -1 - item for item in side]

    return words, [Example(numbered(first), numbered(second)) for first, second in examples]


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedMerges:
    """A corpus whose every epoch is segmented in its own way: epoch n always in the same one."""

    segmenter: Segmenter
    corpus: PackedExamples
    """As ``number_words`` numbers them."""
    longest: tuple[float, float]
    """Ids of an input and an output. An example that gets longer is read without dropout."""
    rate: float
    seed: int

    def __call__(self, epoch: int) -> PackedExamples:
        corpus, segmenter = self.corpus.gathered(), self.segmenter
        random = np.random.default_rng(Random(f"merges, {self.seed}, {epoch}").getrandbits(64))
        items = corpus.ids  # [W]
        is_word = items >= 0
        words, lengths = items[is_word], np.ones(len(items), np.int64)
        states = segmenter.states(words, self.rate, random)
        lengths[is_word] = segmenter.lengths(states)
        ends = _sums(lengths, corpus.ends)  # [N, 2]
        too_long = (np.diff(ends.reshape(-1), prepend=0).reshape(-1, 2) > self.longest).any(1)  # [N]
        if too_long.any():
            in_too_long = np.repeat(too_long, np.diff(corpus.ends[:, 1], prepend=0))[is_word]
            states = np.where(in_too_long, segmenter.states(words), states)
            lengths[is_word] = segmenter.lengths(states)
            ends = _sums(lengths, corpus.ends)
        ids = np.empty(lengths.sum(), np.int32)  # [L]
        of_word = np.repeat(is_word, lengths)
        ids[of_word], ids[~of_word] = segmenter.ids(states), -1 - items[~is_word]
        return PackedExamples(ids, ends)


class Segmenter:
    """All ways through the merges of some words."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        """Raises TokenizerError if the tokenizer merges nothing."""
        model = json.loads(tokenizer.to_json())["model"]
        if not model["merges"]:
            raise TokenizerError("data.bpe_dropout needs a tokenizer with merges")
        vocabulary, end = model["vocab"], model["end_of_word_suffix"] or ""
        self._merges = {
            (vocabulary[left], vocabulary[right]): (rank, vocabulary[left + right])
            for rank, (left, right) in enumerate(model["merges"])
        }
        self._letters = [
            tuple(vocabulary.get(letter, Tokenizer.UNK) for letter in [*word[:-1], word[-1] + end]) for word in words
        ]
        self._vocab_size = tokenizer.vocab_size
        self._forget()

    def states(self, words: NDArray[np.int32], rate: float = 0.0, random: np.random.Generator | None = None) -> Indices:
        """The last state [W] of each word [W]; without ``random`` the one that the tokenizer would give.

        A word that falls into pieces outside the vocabulary is left as the tokenizer gives it.
        """
        if random is None:
            return self._plain[words]
        if len(self._pieces) > _MOST_STATES:
            self._forget()
        states = self._walk(self._start[words], rate, random)
        return np.where(self._unknown.array[states], self._plain[words], states)

    def lengths(self, states: Indices) -> Indices:
        """[W]: the number of pieces of each state."""
        return np.diff(self._ends.array)[states]

    def ids(self, states: Indices) -> Indices:
        """[L]: the pieces of these states, one after another; those outside the vocabulary are <unk>."""
        lengths = self.lengths(states)
        places = np.repeat(self._ends.array[states] - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())
        ids = self._ids.array[places]
        return np.where(ids < self._vocab_size, ids, Tokenizer.UNK)

    def _walk(self, states: Indices, rate: float, random: np.random.Generator) -> Indices:
        """From states to the last ones on their ways, all of them a step at a time."""
        states, walking = states.copy(), np.arange(len(states))
        while len(walking):
            here = states[walking]
            left_out = random.geometric(1.0 - rate, len(walking)) - 1  # of the possible merges, the first ones
            goes_on = left_out < np.diff(self._steps.array)[here]
            walking, here, left_out = walking[goes_on], here[goes_on], left_out[goes_on]
            steps = self._steps.array[here] + left_out
            new = self._next.array[steps] < 0
            for step, state, index in zip(*(x[new].tolist() for x in (steps, here, left_out)), strict=True):
                if self._next.array[step] < 0:
                    self._next.array[step] = self._take(state, index)
            states[walking] = self._next.array[steps]
        return states

    def _forget(self) -> None:
        self._pieces: list[tuple[int, ...]] = []
        self._number: dict[tuple[int, ...], int] = {}
        self._ids, self._ends = _Growing(), _Growing([0])
        """All states' pieces one after another, and where those of each end, after a 0."""
        self._next, self._steps = _Growing(), _Growing([0])
        """The state after each possible merge of each state, -1 while nobody went there; where those of each state end."""
        self._unknown = _Growing()
        """1 for a state with a piece outside the vocabulary."""
        self._start = np.array([self._state(letters) for letters in self._letters], np.int64)
        self._plain = self._walk(self._start, 0.0, np.random.default_rng(0))

    def _state(self, pieces: tuple[int, ...]) -> int:
        known = self._number.get(pieces)
        if known is not None:
            return known
        self._number[pieces] = state = len(self._pieces)
        self._pieces.append(pieces)
        self._ids.extend(pieces)
        self._ends.extend([len(self._ids)])
        self._next.extend([-1] * sum(pair in self._merges for pair in pairwise(pieces)))
        self._steps.extend([len(self._next)])
        self._unknown.extend([max(pieces) >= self._vocab_size])
        return state

    def _take(self, state: int, index: int) -> int:
        """The state after the possible merge of this index: those learnt first come first, then those further left."""
        pieces, merges = self._pieces[state], self._merges
        possible = sorted((*merges[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in merges)
        _, merged, i = possible[index]
        return self._state((*pieces[:i], merged, *pieces[i + 2 :]))


class _Growing:
    """An array of integers that is extended at its end."""

    def __init__(self, values: Sequence[int] = ()) -> None:
        self._room, self._length = np.empty(1024, np.int64), 0
        self.extend(values)

    def __len__(self) -> int:
        return self._length

    @property
    def array(self) -> NDArray[Any]:
        """A view, until it is extended."""
        return self._room[: self._length]

    def extend(self, values: Sequence[int]) -> None:
        length = self._length + len(values)
        if length > len(self._room):
            self._room = np.concatenate([self.array, np.empty(max(length, len(self._room)), np.int64)])
        self._room[self._length : length] = values
        self._length = length


def _sums(lengths: Indices, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """How much of ``lengths`` stands in front of each of ``ends``."""
    return np.concatenate([[0], lengths.cumsum()])[ends]
