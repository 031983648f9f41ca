import numpy as np
import pytest
import sacrebleu

from model import metrics
from model.significance import (
    bleu_score,
    bleu_statistics,
    hit_rate,
    hit_statistics,
    paired_bootstrap,
    perplexity_score,
)

REFERENCES = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore",
    "a man , a plan , a canal",
]
GOOD = ["the quick brown fox jumps over a lazy dog", "she sells sea shells on the shore", "a man , a plan , a canal"]
POOR = ["a quick fox jumped over some dog", "she sold shells by the shore", "one man , the plan , a big canal"]


@pytest.mark.parametrize("tokenized", [True, False])
def test_sums_of_statistics_give_the_corpus_s_bleu(tokenized: bool) -> None:
    whole = metrics.tokenized_bleu if tokenized else metrics.bleu
    for outputs in (GOOD, POOR):
        statistics = bleu_statistics(outputs, REFERENCES, tokenized=tokenized)
        assert bleu_score(statistics.sum(0)) == pytest.approx(whole(outputs, REFERENCES))


def test_a_clear_difference_is_significant_and_none_is_not() -> None:
    ours, theirs = (bleu_statistics(texts * 30, REFERENCES * 30, tokenized=True) for texts in (GOOD, POOR))
    found = paired_bootstrap("bleu", bleu_score, (ours, theirs))
    assert found.difference > 20
    assert 0 < found.low < found.difference < found.high
    assert found.p < 0.01
    same = paired_bootstrap("bleu", bleu_score, (ours, ours))
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_p_value_is_sacrebleu_s() -> None:
    """Different resamples of the same test set, so equal up to chance."""
    rng = np.random.default_rng(0)
    words = np.array(["a", "b", "c", "d", "e", "f", "g", "h"])
    references = [" ".join(rng.choice(words, 9)) for _ in range(80)]

    def noisy(share: float) -> list[str]:
        return [" ".join(w if rng.random() > share else "x" for w in text.split()) for text in references]

    ours, theirs = noisy(0.20), noisy(0.23)
    pair = [bleu_statistics(texts, references, tokenized=True) for texts in (ours, theirs)]
    found = paired_bootstrap("bleu", bleu_score, pair)
    metric = sacrebleu.BLEU(tokenize="none", force=True, lowercase=True, references=[references])
    from sacrebleu.significance import PairedTest

    _, scores = PairedTest([("theirs", theirs), ("ours", ours)], {"BLEU": metric}, None, test_type="bs", n_samples=1000)()
    theirs_result, ours_result = scores["BLEU"]
    assert found.ours == pytest.approx(ours_result.score)
    assert found.theirs == pytest.approx(theirs_result.score)
    assert found.p == pytest.approx(ours_result.p_value, abs=0.06)


def test_rates_and_perplexity() -> None:
    assert hit_rate(hit_statistics(["a", "b", "c", "d"], ["a", "b", "x", "d"]).sum(0)) == 75.0
    assert perplexity_score(np.array([2.0 * np.log(7.0), 2.0])) == pytest.approx(7.0)


def test_a_coin_s_luck_is_called_luck() -> None:
    """Two systems of equal skill: over many test sets about one in twenty looks significant at 5 %."""
    rng = np.random.default_rng(3)
    low = 0
    for _ in range(60):
        pair = [np.stack([rng.random(200) < 0.7, np.ones(200)], axis=1).astype(float) for _ in range(2)]
        low += paired_bootstrap("accuracy", hit_rate, pair).p < 0.05
    assert low <= 9


def test_other_examples_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="not of the same examples"):
        paired_bootstrap("accuracy", hit_rate, (hit_statistics(["a"], ["a"]), hit_statistics(["a", "b"], ["a", "b"])))
