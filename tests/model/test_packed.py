from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from model.batches import Example
from model.packed import PackedFiles, pack
from model.prepare import prepare
from model.recipe import Recipe
from model.tokenizer import Tokenizer
from tests.model.corpora import labelled_recipe, parallel_recipe, text_recipe, write_lines


def some_examples(count: int = 50) -> list[Example]:
    random = Random(1)
    return [Example(random.choices(range(9), k=random.randint(0, 5)), random.choices(range(9), k=3)) for _ in range(count)]


def test_what_is_packed_comes_out_again() -> None:
    examples = some_examples()
    packed = pack(iter(examples))
    assert list(packed) == examples
    assert packed[-1] == examples[-1]
    assert packed[3:40:7] == examples[3:40:7]
    assert packed.lengths().tolist() == [[len(e.input), len(e.output)] for e in examples]
    with pytest.raises(IndexError):
        packed[len(examples)]


def test_a_choice_leaves_the_others_out() -> None:
    examples = some_examples()
    packed = pack(examples)
    keep = packed.lengths()[:, 0] > 2
    chosen = packed.only(keep)
    assert list(chosen) == [e for e in examples if len(e.input) > 2]
    assert chosen.lengths().tolist() == packed.lengths()[keep].tolist()
    assert list(chosen.only(np.arange(len(chosen)) < 2)) == list(chosen)[:2]


def test_examples_are_made_once_and_then_mapped(tmp_path: Path) -> None:
    files, examples, calls = PackedFiles(tmp_path / "folder"), some_examples(), 0

    def make() -> list[Example]:
        nonlocal calls
        calls += 1
        return examples

    for _ in range(2):
        mapped = files.examples({"a": 1}, make)
        assert isinstance(mapped.ids, np.memmap)
        assert list(mapped) == examples
    assert calls == 1
    assert list(files.examples({"a": 2}, lambda: examples[:1])) == examples[:1]
    assert len(list((tmp_path / "folder").iterdir())) == 4


@pytest.mark.parametrize("kind", ["ids", "ends"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "pickled"])
def test_a_damaged_file_is_made_again(damage: str, kind: str, tmp_path: Path) -> None:
    files, examples = PackedFiles(tmp_path), some_examples()
    files.examples({}, lambda: examples)
    (path,) = tmp_path.glob(f"*.{kind}.npy")
    if damage == "pickled":
        with path.open("wb") as file:
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-8] if damage == "cut" else b"")
    assert list(files.examples({}, lambda: examples)) == examples


@pytest.mark.parametrize("make_recipe", [parallel_recipe, labelled_recipe, text_recipe])
def test_a_corpus_is_tokenised_once(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time, and with the run's own tokenizer, everything is found; it is the same as without files."""
    recipe, folder = make_recipe(tmp_path), tmp_path / "cache"
    first = prepare(recipe, None, folder)
    held_out = first.held_out

    def no_more(*_: object) -> None:
        raise AssertionError("tokenised again")

    in_memory = prepare(recipe)
    with monkeypatch.context() as patch:
        for name in ("encode_texts", "encode_text", "train_bpe", "train_characters"):
            patch.setattr(Tokenizer, name, no_more)
        for tokenizer in (None, first.tokenizer):
            again = prepare(recipe, tokenizer, folder)
            assert again.tokenizer.to_json() == first.tokenizer.to_json()
            assert (again.held_out, again.left_out, again.digests) == (held_out, first.left_out, first.digests)
            for part in ("train", "validation"):
                assert list(getattr(again, part).examples(1)) == list(getattr(in_memory, part).examples(1))


def test_another_corpus_tokenizer_or_limit_is_not_mistaken_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    recipe = parallel_recipe(tmp_path)
    before = prepare(recipe, None, folder)
    shorter = prepare(parallel_recipe(tmp_path, "model.max_source_length=4"), None, folder)
    assert shorter.left_out > before.left_out == 0
    assert max(len(e.input) for e in shorter.train.examples(0)) <= 4
    larger = prepare(parallel_recipe(tmp_path, "tokenizer.vocab_size=310"), None, folder)
    assert larger.tokenizer.vocab_size > before.tokenizer.vocab_size
    assert list(larger.train.examples(0)) != list(before.train.examples(0))
    write_lines(tmp_path / "train.en.gz", ["a man", "a dog"])
    write_lines(tmp_path / "train.de.gz", ["ein mann", "ein hund"])
    assert len(prepare(recipe, before.tokenizer, folder).train.examples(0)) == 2
