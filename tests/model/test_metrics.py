import pytest

from model import metrics


def test_exact_match_is_a_percentage() -> None:
    assert metrics.exact_match(["a", "b", "c", "d"], ["a", "b", "c", "x"]) == 75.0


def test_bleu_by_hand() -> None:
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; no brevity penalty."""
    output, target = ["the cat sat on a mat"], ["the cat sat on the mat"]
    assert metrics.bleu(output, target) == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_tokenized_bleu_takes_words_as_they_stand() -> None:
    output, target = ["&quot; Ein Mann geht . &quot;"], ["&quot; ein mann geht . &quot;"]
    assert metrics.tokenized_bleu(output, target) == pytest.approx(100.0)
    assert metrics.bleu(output, target) < 100.0


def test_chrf_is_full_for_the_same_text() -> None:
    assert metrics.chrf(["genau gleich"], ["genau gleich"]) == pytest.approx(100.0)


def test_classification_averages_over_the_classes() -> None:
    """Class a: precision 2/3, recall 1. Class b: precision 1, recall 1/2. Class c never occurs."""
    result = metrics.classification(["a", "a", "a", "b"], ["a", "a", "b", "b"], ["a", "b", "c"])
    assert result["accuracy"] == 75.0
    assert result["precision"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert result["recall"] == pytest.approx(100 * (1 + 1 / 2 + 0) / 3)
    assert result["f1"] == pytest.approx(100 * (4 / 5 + 2 / 3 + 0) / 3)
