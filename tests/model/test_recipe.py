from dataclasses import fields
from pathlib import Path

import pytest

from model.config import ModelConfig
from model.recipe import RecipeError, load_recipe, read_recipe, shipped_recipes
from model.transformer import Transformer
from tests.model.corpora import parallel_recipe


def problems_of(*overrides: str, recipe: str = "dates") -> list[str]:
    with pytest.raises(RecipeError) as refusal:
        load_recipe(recipe, overrides)
    return refusal.value.problems


def test_all_five_recipes_are_shipped() -> None:
    assert shipped_recipes() == ["dates", "multi30k-bpe-dropout", "multi30k-en-de", "sst2", "tinyshakespeare"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_read_written_and_built(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.task.name == name
    assert read_recipe(recipe.to_toml()) == recipe
    assert Transformer(recipe.model_config(300)).config.vocab_size == 300


def test_everything_wrong_is_named_at_once() -> None:
    assert problems_of(
        "model.heads=3", "model.foo=1", "training.learning_rate='fast'", "task.metric='bleu4'", "data.held_out=2.5", "extra.x=1"
    ) == [
        "unknown section [extra]",
        "task.metric must be one of 'exact_match', 'bleu', 'tokenized_bleu', 'perplexity', 'accuracy', not 'bleu4'",
        "data.held_out must be a whole number, not 2.5",
        "unknown key model.foo",
        "training.learning_rate must be a number, not 'fast'",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.heads=3", "model.d_model (128) must be divisible by heads (3)"),
        ("model.vocab_size=9", "model.vocab_size follows from the tokenizer"),
        ("model.family='decoder_only'", "encoder_layers must be 0"),
        ("training.max_updates=0", "training.max_updates must be at least 1, not 0"),
        ("training.max_updates=true", "training.max_updates must be a whole number, not True"),
        ("training.learning_rate=nan", "training.learning_rate must be at least 0, not nan"),
        ("training.warmup_updates=99999", "training.warmup_updates (99999) must not exceed max_updates"),
        ("training.label_smoothing=1.0", "training.label_smoothing must be in [0, 1), not 1.0"),
        ("training.betas=[0.9]", "training.betas must be a list of 2, not [0.9]"),
        ("training.betas=[0.9, 1.5]", "training.betas must be in [0, 1), not [0.9, 1.5]"),
        ("training.momentum=0.9", "training.momentum must be 0 for adamw"),
        ("task.metric='accuracy'", "task.metric of sequence_to_sequence must be one of exact_match"),
        ("task.labels=['a', 'b']", "task.labels must be empty for sequence_to_sequence"),
        ("data.generator='birds'", "data.generator must be one of dates, not 'birds'"),
        ("data.train=['a', 'b']", "data.train must be empty beside data.generator"),
        ("data.train='a'", "data.train must be a list, not 'a'"),
        ("data.train=[1]", "data.train must be a list, each a text in quotes, not [1]"),
        ("tokenizer.vocab_size=9", "tokenizer.vocab_size must be 0 for characters"),
        ("tokenizer.codes='x'", "tokenizer.codes must be empty for characters"),
        ("generation.beams=0", "generation.beams must be at least 1, not 0"),
        ("nonsense", "--set must be section.key=value, not 'nonsense'"),
        ("beams=3", "--set must be section.key=value"),
    ],
)
def test_an_impossible_value_is_refused_by_name(override: str, problem: str) -> None:
    assert any(line.startswith(problem) or problem in line for line in problems_of(override))


def test_muon_needs_whole_matrices() -> None:
    problems = problems_of("training.optimizer='muon'", "training.parallel='sharded'")
    assert problems == ["training.optimizer=muon needs whole matrices: not with training.parallel=sharded"]


def test_files_that_a_task_needs_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.train must be two files, source and target, not 1"):
        parallel_recipe(tmp_path, "data.train=['a']")
    assert problems_of("data.train=[]", "data.validation=[]", recipe="sst2") == [
        "data.train must name files (or data.generator a task)",
        "data.validation must name files",
    ]
    assert problems_of("task.labels=['one']", recipe="sst2") == [
        "model.classes must be 0 or at least 2, not 1",
        "task.labels must name at least 2 classes",
    ]


def test_overrides_are_toml_values_or_bare_text() -> None:
    recipe = load_recipe("multi30k-en-de", ["data.root=/some where/multi30k", "training.betas=[0.8, 0.9]", "model.dropout=0"])
    assert recipe.data.root == "/some where/multi30k"
    assert recipe.training.betas == (0.8, 0.9)
    assert recipe.model.dropout == 0.0
    assert recipe.path("a.gz") == Path("/some where/multi30k/a.gz")


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(load_recipe("dates").to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == load_recipe("dates")
    with pytest.raises(RecipeError, match=r"nowhere.toml: No such file .*shipped recipes: dates"):
        load_recipe(str(tmp_path / "nowhere.toml"))


@pytest.mark.parametrize("text", ["", "[task", "task = 3", "\ufeff"])
def test_a_damaged_recipe_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        read_recipe(text)


def test_the_keys_left_out_of_the_model_are_its_own() -> None:
    recipe = load_recipe("dates")
    missing = {f.name for f in fields(ModelConfig)} - set(recipe.to_toml().split("[model]")[1].split("[training]")[0].split())
    assert missing == {"vocab_size", "classes", "kv_heads"}
