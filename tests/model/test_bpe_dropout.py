from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import bpe_dropout
from model.batches import Example
from model.bpe_dropout import DroppedMerges, Segmenter, number_words
from model.packed import pack
from model.prepare import Prepared, prepare
from model.recipe import Recipe, RecipeError, load_recipe
from model.tokenizer import Tokenizer, TokenizerError
from tests.model.corpora import labelled_recipe, parallel_recipe, text_recipe, write_lines
from tests.model.test_tokenizer import CODES, MERGES, TEXTS, TOKENIZERS

KINDS = [kind for kind in TOKENIZERS if kind != "characters"]
DROPOUT = "data.bpe_dropout=0.3"


def segment(tokenizer: Tokenizer, words: list[str], rate: float, seed: int = 1) -> list[int]:
    segmenter = Segmenter(tokenizer, words)
    return segmenter.ids(segmenter.states(np.arange(len(words), dtype=np.int32), rate, np.random.default_rng(seed))).tolist()


def dropped(tokenizer: Tokenizer, texts: list[str], longest: float = 1000, seed: int = 1) -> DroppedMerges:
    """Texts as inputs, an id of their own after each, and nothing else."""
    words, examples = number_words([([*tokenizer.words(text), Tokenizer.EOS], [7]) for text in texts])
    corpus = pack(examples)
    return DroppedMerges(segmenter=Segmenter(tokenizer, words), corpus=corpus, longest=(longest, 1), rate=0.3, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("lowernstid "))
def test_without_dropout_words_fall_into_the_pieces_of_the_tokenizer(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    words = tokenizer.words(text)
    assert segment(tokenizer, words, 0.0) == tokenizer.encode_text(text)
    segmenter, rows = Segmenter(tokenizer, words), np.arange(len(words), dtype=np.int32)
    assert segmenter.ids(segmenter.states(rows)).tolist() == tokenizer.encode_text(text)


def chances(pieces: tuple[str, ...], rate: float) -> Counter[tuple[str, ...]]:
    """The probability of each way in which a word may end up, by the definition."""
    places = [i for i, pair in enumerate(pairwise(pieces)) if pair in MERGES]
    places.sort(key=lambda i: (MERGES.index((pieces[i], pieces[i + 1])), i))
    found = Counter({pieces: rate ** len(places)})
    for left_out, i in enumerate(places):
        chance = rate**left_out * (1 - rate)
        for end, probability in chances((*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]), rate).items():
            found[end] += chance * probability
    return found


@pytest.mark.parametrize("word", ["lowest", "widest", "newest"])
def test_each_segmentation_comes_as_often_as_the_definition_says(word: str) -> None:
    tokenizer, rate, count = Tokenizer.from_subword_nmt(CODES, TEXTS, every_piece=True), 0.3, 20_000
    segmenter = Segmenter(tokenizer, [word])
    states = segmenter.states(np.zeros(count, np.int32), rate, np.random.default_rng(1))
    drawn = {
        tuple(tokenizer.pieces(segmenter.ids(np.array([state])))): times / count for state, times in Counter(states).items()
    }
    expected = chances((*word[:-1], word[-1] + "</w>"), rate)
    assert sum(expected.values()) == pytest.approx(1)
    assert len(expected) > 5
    assert all(abs(drawn.get(pieces, 0) - chance) < 0.012 for pieces, chance in expected.items())  # over 3 standard errors
    assert drawn.keys() <= expected.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_stays_the_same(kind: str) -> None:
    tokenizer = Tokenizer.from_subword_nmt(CODES, TEXTS, every_piece=True) if kind == "subword_nmt" else TOKENIZERS[kind]
    epochs = dropped(tokenizer, TEXTS)
    seen = set()
    for epoch in range(5):
        examples = epochs(epoch)
        assert [tokenizer.decode(example.input) for example in examples] == TEXTS
        assert all(example.input[-1] == Tokenizer.EOS and example.output == [7] for example in examples)
        seen.add(str(list(examples)))
    assert len(seen) == 5


def test_seed_and_epoch_alone_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what was segmented before, nor what was forgotten of it."""
    tokenizer = TOKENIZERS["bpe"]
    one, other = dropped(tokenizer, TEXTS), dropped(tokenizer, TEXTS)
    in_order = [list(one(epoch)) for epoch in range(4)]
    assert [list(other(epoch)) for epoch in (3, 0)] == [in_order[3], in_order[0]]
    monkeypatch.setattr(bpe_dropout, "_MOST_STATES", 1)
    assert [list(other(epoch)) for epoch in range(4)] == in_order
    assert list(dropped(tokenizer, TEXTS, seed=2)(0)) != in_order[0]


def test_what_would_get_too_long_is_read_without_dropout() -> None:
    tokenizer = TOKENIZERS["bpe"]
    plain = [Example([*tokenizer.encode_text(text), Tokenizer.EOS], [7]) for text in TEXTS]
    longest = max(len(example.input) for example in plain)
    epochs = dropped(tokenizer, TEXTS, longest)
    examples = [epochs(epoch) for epoch in range(20)]
    assert all(len(example.input) <= longest for epoch in examples for example in epoch)
    i = [len(example.input) for example in plain].index(longest)
    assert sum(epoch[i] == plain[i] for epoch in examples) > 10
    assert any(epoch[j] != plain[j] for epoch in examples for j in range(len(plain)))


def test_no_word_becomes_unknown() -> None:
    """The vocabulary of pieces in use lacks steps on the way: words that would need one are left whole."""
    small, large = TOKENIZERS["subword_nmt"], Tokenizer.from_subword_nmt(CODES, TEXTS, every_piece=True)
    assert small.vocab_size < large.vocab_size
    assert small.pieces(range(small.vocab_size)) == large.pieces(range(small.vocab_size))
    words = [word for text in TEXTS for word in text.split(" ")] * 20
    assert Tokenizer.UNK not in segment(small, words, 0.3)
    assert len(segment(large, words, 0.3)) > len(segment(small, words, 0.3)) >= len(segment(small, words, 0.0))


def epochs_of(prepared: Prepared) -> list[list[Example]]:
    return [list(prepared.train.examples(epoch)) for epoch in range(3)]


@pytest.mark.parametrize("make_recipe", [parallel_recipe, labelled_recipe, text_recipe])
def test_only_what_is_learnt_from_is_cut_up(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = ["tokenizer.kind=bpe", "tokenizer.vocab_size=300"]
    plain, cut = (prepare(make_recipe(tmp_path, *settings, *more)) for more in ([], [DROPOUT]))
    assert list(cut.plain()) == list(plain.train.examples(0))
    assert list(cut.validation.examples(0)) == list(plain.validation.examples(0))
    assert (cut.held_out, cut.left_out) == (plain.held_out, plain.left_out)
    first, second, third = epochs_of(cut)
    assert first != second != third != first
    assert cut.train.epoch(1).plan == cut.train.epoch(1).plan
    if make_recipe is not text_recipe:
        decode = plain.tokenizer.decode
        assert [decode(e.input) for e in first] == [decode(e.input) for e in plain.plain()]
        if make_recipe is labelled_recipe:
            assert [e.output for e in first] == [e.output for e in plain.plain()]
        else:
            assert [decode(e.output) for e in first] == [decode(e.output) for e in plain.plain()]


@pytest.mark.parametrize("make_recipe", [parallel_recipe, labelled_recipe])
def test_words_are_mapped_and_found_again(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = make_recipe(tmp_path, DROPOUT), tmp_path / "cache"
    if make_recipe is parallel_recipe:
        write_lines(tmp_path / "train.en.gz", ["a man", "", "a dog " * 40, "here the man sleeps"])
        write_lines(tmp_path / "train.de.gz", ["ein mann", "leer", "ein hund", "hier schläft der mann"])
    in_memory, mapped = epochs_of(prepare(recipe)), epochs_of(prepare(recipe, None, folder))

    def no_more(*_: Any) -> None:
        raise AssertionError("split again")

    monkeypatch.setattr(Tokenizer, "words", no_more)
    assert in_memory == mapped == epochs_of(prepare(recipe, None, folder))


def test_what_has_no_merges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.bpe_dropout must be 0 for characters"):
        text_recipe(tmp_path, DROPOUT)
    with pytest.raises(RecipeError, match=r"data.bpe_dropout must be 0 beside data.generator"):
        load_recipe("dates", [DROPOUT])
    with pytest.raises(RecipeError, match=r"data.bpe_dropout must be in \[0, 1\), not 1.0"):
        parallel_recipe(tmp_path, "data.bpe_dropout=1.0")
    with pytest.raises(TokenizerError, match=r"data.bpe_dropout needs a tokenizer with merges"):
        prepare(parallel_recipe(tmp_path, DROPOUT), Tokenizer.train_characters(["a man dog"]))
