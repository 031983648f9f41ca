from random import Random

import numpy as np
import pytest
import torch

from model.batches import IGNORE, Corpus, Epoch, Example, Windows, plan_batches


def make_examples(count: int, longest: int = 40) -> list[Example]:
    random = Random(3)
    return [Example([5] * random.randint(1, longest), [6] * random.randint(1, longest)) for _ in range(count)]


def make_corpus(examples: list[Example], seed: int = 1) -> Corpus:
    return Corpus(examples=lambda epoch: examples, kind="sequence_to_sequence", batch_tokens=512, seed=seed)


def test_every_example_is_in_one_batch_of_bounded_size() -> None:
    examples = make_examples(1000)
    plan = plan_batches(examples, 512, Random(1))
    assert sorted(i for batch in plan for i in batch) == list(range(1000))
    assert all(len(batch) * max(examples[i].length for i in batch) <= 512 for batch in plan)


def test_an_example_larger_than_a_batch_has_one_to_itself() -> None:
    plan = plan_batches([Example([5] * 9, [6]), Example([5] * 100, [6]), Example([5] * 9, [6])], 20, Random(1))
    assert sorted(map(sorted, plan)) == [[0, 2], [1]]


def test_seed_and_epoch_alone_decide_the_order() -> None:
    corpus = make_corpus(make_examples(300))
    assert corpus.epoch(4).plan == corpus.epoch(4).plan
    assert corpus.epoch(4).plan != corpus.epoch(5).plan
    assert corpus.epoch(4).plan != make_corpus(make_examples(300), seed=2).epoch(4).plan


def test_similar_lengths_leave_little_padding() -> None:
    symmetric = [Example(e.input, e.input) for e in make_examples(2000)]
    assert make_corpus(symmetric).epoch(0).padding() < 0.06
    one_each = Epoch([Example([5, 5], [6])] * 3, [[0], [1], [2]], "sequence_to_sequence")
    assert one_each.padding() == 0.0
    assert Epoch([Example([5] * 4, [6] * 3), Example([5] * 2, [6])], [[0, 1]], "sequence_to_sequence").padding() == 4 / 16


def test_pairs_are_shifted_and_padded() -> None:
    epoch = Epoch([Example([7, 8, 2], [9]), Example([7, 2], [9, 10, 11])], [[0, 1]], "sequence_to_sequence")
    batch = epoch[0]
    source, lengths, target = batch.inputs
    assert source.tolist() == [[7, 8, 2], [7, 2, 0]]
    assert lengths.tolist() == [3, 2]
    assert target.tolist() == [[1, 9, 0, 0], [1, 9, 10, 11]]
    assert batch.labels.tolist() == [[9, 2, IGNORE, IGNORE], [9, 10, 11, 2]]
    assert epoch.label_count(0) == int((batch.labels != IGNORE).sum())


def test_labelled_texts_carry_one_class_each() -> None:
    epoch = Epoch([Example([7, 2], [1]), Example([7, 8, 2], [0])], [[0, 1]], "classification")
    batch = epoch[0]
    assert batch.labels.tolist() == [1, 0]
    assert epoch.label_count(0) == 2
    assert batch.inputs[0].dtype == batch.labels.dtype == torch.int64


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("length", [11, 12, 13, 24])
def test_windows_ask_for_every_token_once(length: int, offset: int) -> None:
    text = list(range(100, 100 + length))
    examples = Windows(np.array(text, np.int32), 5, offset)
    assert [token for e in examples for token in e.output] == text[offset + 1 :]
    assert all(list(e.output) == [token + 1 for token in e.input] and 1 <= len(e.input) <= 5 for e in examples)
    epoch = Epoch(examples, [list(range(len(examples)))], "language_model")
    batch = epoch[0]
    assert epoch.label_count(0) == length - 1 - offset
    assert batch.inputs[0].shape == batch.labels.shape
