"""Measures of output against what was wanted. Percentages are from 0 to 100, as the field reports them."""

from __future__ import annotations

from collections.abc import Sequence

import sacrebleu


def exact_match(outputs: Sequence[str], targets: Sequence[str]) -> float:
    """The share of outputs that are the target, in percent."""
    return 100.0 * sum(o == t for o, t in zip(outputs, targets, strict=True)) / len(targets)


def bleu(outputs: Sequence[str], targets: Sequence[str]) -> float:
    """sacreBLEU with its default tokenisation, for raw text."""
    return sacrebleu.corpus_bleu(list(outputs), [list(targets)]).score


def tokenized_bleu(outputs: Sequence[str], targets: Sequence[str]) -> float:
    """BLEU of text that is tokenised already, lower-cased: what multi-bleu.perl -lc reports. Never compare it with ``bleu``."""
    lower = [[text.lower() for text in texts] for texts in (outputs, targets)]
    return sacrebleu.corpus_bleu(lower[0], [lower[1]], tokenize="none", force=True).score


def chrf(outputs: Sequence[str], targets: Sequence[str]) -> float:
    return sacrebleu.corpus_chrf(list(outputs), [list(targets)]).score


TEXT_METRICS = {"exact_match": exact_match, "bleu": bleu, "tokenized_bleu": tokenized_bleu}
"""What a recipe may name as the metric of a task whose outputs are texts."""


def classification(outputs: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 averaged over the classes, all in percent."""
    precisions, recalls, f1s = [], [], []
    for label in labels:
        hits = sum(o == t == label for o, t in zip(outputs, targets, strict=True))
        precision = hits / max(1, sum(o == label for o in outputs))
        recall = hits / max(1, sum(t == label for t in targets))
        precisions.append(precision)
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    means = {
        name: 100.0 * sum(values) / len(labels)
        for name, values in (("precision", precisions), ("recall", recalls), ("f1", f1s))
    }
    return {"accuracy": exact_match(outputs, targets), **means}
