import math
from pathlib import Path

import pytest
from rich.console import Console

from model.checkpoint import Run
from model.data import DataError
from model.decode import beam_search, greedy
from model.evaluate import compare_runs, evaluate_run, translate
from model.train import train
from tests.model.corpora import labelled_recipe, parallel_recipe, text_recipe, write_lines

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def translation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("translation")
    return train(parallel_recipe(folder, "task.metric='tokenized_bleu'"), folder / "run", console=QUIET), folder


def test_batched_translation_is_the_reference_decoder_s(translation: tuple[Run, Path]) -> None:
    run, _ = translation
    sources = [example["source"] for example in run.held_out[:8]]
    reference = [greedy(run.model, run.tokenizer.encode_source(source), 32) for source in sources]
    assert translate(run, sources) == [run.tokenizer.decode(hypothesis.text_tokens) for hypothesis in reference]


def test_beams_translate_by_the_reference_beam_search(translation: tuple[Run, Path]) -> None:
    run, _ = translation
    seen = []
    sources = [example["source"] for example in run.held_out[:3]]
    outputs = translate(run, sources, beams=3, on_progress=lambda done, everything: seen.append((done, everything)))
    reference = [beam_search(run.model, run.tokenizer.encode_source(source), beams=3, max_tokens=32)[0] for source in sources]
    assert outputs == [run.tokenizer.decode(hypothesis.text_tokens) for hypothesis in reference]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_files_may_stand_in_for_the_held_out_examples(translation: tuple[Run, Path]) -> None:
    run, folder = translation
    metrics = evaluate_run(run, source=folder / "validation.en.gz", target=folder / "validation.de.gz")
    assert metrics == evaluate_run(run)
    assert set(metrics) == {"exact_match", "tokenized_bleu", "chrf"}
    with pytest.raises(DataError, match="needs source and target"):
        evaluate_run(run, source=folder / "validation.en.gz")


def test_a_source_longer_than_the_model_is_cut(translation: tuple[Run, Path]) -> None:
    run, _ = translation
    assert len(translate(run, ["a dog " * 100])) == 1


def test_perplexity_counts_every_token_once(tmp_path: Path) -> None:
    """Under a uniform model each token costs log V, however the text is cut."""
    run = train(text_recipe(tmp_path, "training.max_updates=1", "training.warmup_updates=0"), tmp_path / "run", console=QUIET)
    run.model.embedding.data.zero_()
    uniform = math.log(run.config.vocab_size)
    for metrics in (evaluate_run(run), evaluate_run(run, source=tmp_path / "text.txt")):
        assert metrics["nats_per_token"] == pytest.approx(uniform, rel=1e-5)
        assert metrics["nats_per_character"] == pytest.approx(uniform, rel=1e-5)
        assert metrics["perplexity"] == pytest.approx(run.config.vocab_size, rel=1e-4)
    with pytest.raises(DataError, match="needs a source alone"):
        evaluate_run(run, source=tmp_path / "text.txt", target=tmp_path / "text.txt")


def test_labelled_files_are_classified(tmp_path: Path) -> None:
    run = train(labelled_recipe(tmp_path), tmp_path / "run", console=QUIET)
    write_lines(tmp_path / "new.txt", ["1 a dog", "1 a dog sleeps", "0 a man"])
    assert set(evaluate_run(run, source=tmp_path / "new.txt")) == {"accuracy", "precision", "recall", "f1"}
    write_lines(tmp_path / "bad.txt", ["1 a dog", "cat a man"])
    with pytest.raises(DataError, match="line 2 begins with 'cat'"):
        evaluate_run(run, source=tmp_path / "bad.txt")


def test_two_runs_are_compared_on_the_same_examples(translation: tuple[Run, Path]) -> None:
    run, folder = translation
    short = ["task.metric='tokenized_bleu'", "training.max_updates=12"]
    other = train(parallel_recipe(folder, *short), folder / "other", console=QUIET)
    bleu, exact = compare_runs(run, other)
    assert (bleu.metric, exact.metric) == ("tokenized_bleu", "exact_match")
    assert bleu.ours == pytest.approx(evaluate_run(run)["tokenized_bleu"])
    assert bleu.theirs == pytest.approx(evaluate_run(other)["tokenized_bleu"])
    assert bleu.difference > 0
    assert bleu.p < 0.05
    files = compare_runs(run, other, source=folder / "validation.en.gz", target=folder / "validation.de.gz")
    assert files == [bleu, exact]


def test_classifiers_and_language_models_are_compared_too(tmp_path: Path) -> None:
    for make_recipe, metric in ((labelled_recipe, "accuracy"), (text_recipe, "perplexity")):
        good, poor = (
            train(make_recipe(tmp_path, f"training.max_updates={n}"), tmp_path / f"{metric}{n}", console=QUIET)
            for n in (60, 10)
        )
        (found,) = compare_runs(good, poor)
        assert found.metric == metric
        assert (found.difference > 0) == (metric == "accuracy")
        assert found.low <= found.difference <= found.high
    with pytest.raises(DataError, match="different tasks cannot be compared: kind"):
        compare_runs(good, train(labelled_recipe(tmp_path), tmp_path / "labels", console=QUIET))
    with pytest.raises(DataError, match="leave the source out"):
        compare_runs(good, poor, source=tmp_path / "text.txt")
