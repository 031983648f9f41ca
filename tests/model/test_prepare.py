from pathlib import Path

import pytest

from model.data import DataError, digest
from model.prepare import prepare
from model.recipe import load_recipe
from model.tokenizer import Tokenizer, TokenizerError
from tests.model.corpora import labelled_recipe, parallel_recipe, text_recipe, write_lines


def test_empty_and_overlong_examples_are_left_out(tmp_path: Path) -> None:
    recipe = parallel_recipe(tmp_path)
    write_lines(tmp_path / "train.en.gz", ["a man", "", "a dog " * 40, "here"])
    write_lines(tmp_path / "train.de.gz", ["ein mann", "leer", "ein hund", "hier"])
    prepared = prepare(recipe)
    assert prepared.left_out == 2
    assert len(prepared.train.epoch(0).examples) == 2
    write_lines(tmp_path / "validation.de.gz", ["hier " * 40] * 40)
    with pytest.raises(DataError, match=r"validation.de.gz: no example is neither empty nor longer"):
        prepare(recipe)


def test_the_test_set_is_held_out_where_there_is_one(tmp_path: Path) -> None:
    recipe = parallel_recipe(tmp_path)
    assert len(prepare(recipe).held_out) == 40
    write_lines(tmp_path / "test.en", ["a man", "here"], zipped=False)
    write_lines(tmp_path / "test.de", ["ein mann", "hier"], zipped=False)
    recipe = parallel_recipe(tmp_path, "data.test=['test.en', 'test.de']", "data.held_out=1")
    assert prepare(recipe).held_out == [{"source": "a man", "target": "ein mann"}]


def test_every_file_is_recorded(tmp_path: Path) -> None:
    digests = prepare(labelled_recipe(tmp_path)).digests
    assert digests == {name: digest(tmp_path / name) for name in ("phrases.tsv.gz", "train.txt", "validation.txt.gz")}


def test_a_text_keeps_its_end_for_validation(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    prepared = prepare(recipe)
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    tokens = prepared.tokenizer.encode_text(text)
    validation = [token for example in prepared.validation.examples(0) for token in example.output]
    assert tokens[-len(validation) :] == validation
    assert len(validation) + 1 == len(tokens) - int(0.9 * len(text))
    assert all(example["source"] + example["target"] in text for example in prepared.held_out)
    assert {len(example["source"]) for example in prepared.held_out} == {24 // 4}


def test_every_epoch_of_a_text_begins_somewhere_else(tmp_path: Path) -> None:
    train = prepare(text_recipe(tmp_path)).train
    assert list(train.examples(0)) == list(train.examples(0))
    assert len({tuple(train.examples(epoch)[0].input) for epoch in range(10)}) > 5


def test_a_text_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    write_lines(tmp_path / "text.txt", ["too short"], zipped=False)
    with pytest.raises(DataError, match=r"text.txt: 9 tokens to train on, not enough for a context of 24"):
        prepare(recipe)


def test_dates_make_new_pairs_for_every_epoch() -> None:
    prepared = prepare(load_recipe("dates", ["data.epoch_pairs=50", "data.held_out=10"]))
    texts = {
        epoch: {prepared.tokenizer.decode(example.input) for example in prepared.train.examples(epoch)} for epoch in range(3)
    }
    assert len(texts[0] | texts[1] | texts[2]) > 140
    assert prepared.train.examples(1) == prepared.train.examples(1)
    assert len(prepared.held_out) == 10


def test_damaged_merges_are_named(tmp_path: Path) -> None:
    overrides = ["tokenizer.kind='subword_nmt'", "tokenizer.vocab_size=0", "tokenizer.codes='codes'"]
    recipe = parallel_recipe(tmp_path, *overrides)
    (tmp_path / "codes").write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"codes: the first line of the merges"):
        prepare(recipe)


def test_a_tokenizer_that_is_there_is_kept(tmp_path: Path) -> None:
    recipe, tokenizer = parallel_recipe(tmp_path), Tokenizer.train_characters(["a man dog"])
    assert prepare(recipe, tokenizer).tokenizer is tokenizer
