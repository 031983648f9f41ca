"""Examples to batches: of similar length, by number of tokens, in an order that (seed, epoch) alone decides.

Training can therefore stop at any batch and go on from its number.

Shapes: B rows, S source length, T target length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.tokenizer import Tokenizer

Kind = Literal["sequence_to_sequence", "language_model", "classification"]

IGNORE = -100
"""The label of padding: no loss there."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training example in ids.

    sequence_to_sequence: the source with </s>; the target without special tokens.
    language_model:       a stretch of text; the same one token later.
    classification:       the source with </s>; the class alone.
    """

    input: Sequence[int]
    output: Sequence[int]

    @property
    def length(self) -> int:
        """Positions in the longer of its sequences, special tokens included."""
        return max(len(self.input), len(self.output) + 1)


@dataclass(frozen=True, slots=True)
class Batch:
    inputs: tuple[Tensor, ...]
    """The arguments of ``Transformer.forward``."""
    labels: Tensor
    """[B, T], IGNORE where there is padding; [B] for classification."""

    def to(self, device: torch.device) -> Batch:
        return Batch(tuple(x.to(device) for x in self.inputs), self.labels.to(device))


@dataclass(frozen=True, slots=True)
class Epoch:
    """The batches of one pass over the data, each put together when it is asked for."""

    examples: Sequence[Example]
    plan: list[list[int]]
    """The examples of each batch, by index."""
    kind: Kind

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, batch: int) -> Batch:
        return _COLLATE[self.kind]([self.examples[i] for i in self.plan[batch]])

    def label_count(self, batch: int) -> int:
        """Labels in the batch, padding not counted."""
        return sum(_LABELS[self.kind](self.examples[i]) for i in self.plan[batch])

    def padding(self) -> float:
        """The share of positions, in inputs and outputs, that hold padding."""
        real = padded = 0
        for rows in self.plan:
            for sizes in ([len(self.examples[i].input) for i in rows], [len(self.examples[i].output) + 1 for i in rows]):
                real, padded = real + sum(sizes), padded + max(sizes) * len(sizes)
        return 1 - real / padded


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What training reads: ``epoch(n)`` is always the same for the same n."""

    examples: Callable[[int], Sequence[Example]]
    """The examples of epoch n: the same list every time, or new ones from a task without an end."""
    kind: Kind
    batch_tokens: int
    """Positions a batch may hold, padding included, on its wider side."""
    seed: int

    def epoch(self, number: int) -> Epoch:
        examples = self.examples(number)
        return Epoch(examples, plan_batches(examples, self.batch_tokens, Random(f"batches, {self.seed}, {number}")), self.kind)


def plan_batches(examples: Sequence[Example], batch_tokens: int, random: Random) -> list[list[int]]:
    """Sorts by length (equal lengths in random order), cuts into batches, shuffles the batches."""
    order = list(range(len(examples)))
    random.shuffle(order)
    order.sort(key=lambda i: (examples[i].length, len(examples[i].input)))
    plan: list[list[int]] = [[]]
    for i in order:
        if plan[-1] and (len(plan[-1]) + 1) * examples[i].length > batch_tokens:
            plan.append([])
        plan[-1].append(i)
    random.shuffle(plan)
    return plan


@dataclass(frozen=True, slots=True, eq=False)
class Windows(Sequence[Example]):
    """A text cut into stretches of ``context`` tokens from ``offset`` on, each with its tokens one later as output."""

    tokens: NDArray[np.int32]
    """Of the whole text; may be mapped from a file."""
    context: int
    offset: int = 0

    def __len__(self) -> int:
        return len(range(self.offset, len(self.tokens) - 1, self.context))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(self.offset, len(self.tokens) - 1, self.context)[index]
        stretch = self.tokens[start : start + self.context + 1].tolist()
        return Example(stretch[:-1], stretch[1:])


def _collate_pairs(examples: list[Example]) -> Batch:
    source, lengths = _sources(examples)
    target = _pad([[Tokenizer.BOS, *e.output] for e in examples], Tokenizer.PAD)  # [B, T]
    labels = _pad([[*e.output, Tokenizer.EOS] for e in examples], IGNORE)  # [B, T]
    return Batch((source, lengths, target), labels)


def _collate_texts(examples: list[Example]) -> Batch:
    tokens = _pad([e.input for e in examples], Tokenizer.PAD)  # [B, T]
    return Batch((tokens,), _pad([e.output for e in examples], IGNORE))


def _collate_labelled(examples: list[Example]) -> Batch:
    return Batch(_sources(examples), torch.tensor([e.output[0] for e in examples]))


_COLLATE: dict[Kind, Callable[[list[Example]], Batch]] = {
    "sequence_to_sequence": _collate_pairs,
    "language_model": _collate_texts,
    "classification": _collate_labelled,
}


_LABELS: dict[Kind, Callable[[Example], int]] = {
    "sequence_to_sequence": lambda example: len(example.output) + 1,  # </s> is learnt as well
    "language_model": lambda example: len(example.output),
    "classification": lambda example: 1,
}


def _sources(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """[B, S] and the lengths [B]."""
    return _pad([e.input for e in examples], Tokenizer.PAD), torch.tensor([len(e.input) for e in examples])


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
