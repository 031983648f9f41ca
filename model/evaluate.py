"""Measures a trained run on its held-out examples, or on files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model import metrics
from model.batches import Corpus, Example, Windows
from model.checkpoint import Run
from model.data import DataError, read_labelled, read_parallel, read_text
from model.decode import beam_search, greedy_batch, score
from model.objective import validate
from model.significance import (
    Comparison,
    bleu_score,
    bleu_statistics,
    hit_rate,
    hit_statistics,
    paired_bootstrap,
    perplexity_score,
)
from model.tokenizer import Tokenizer
from model.transformer import Transformer

_BATCH_TOKENS = 8192


def evaluate_run(
    run: Run,
    *,
    source: Path | None = None,
    target: Path | None = None,
    beams: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The metrics of the run's task, by name.

    Args:
        source: parallel text with ``target``, labelled or plain text, whichever the task reads; None: the held-out examples.
        beams: 1 decodes greedily in batches; more use the reference beam search, one sentence at a time.
        on_progress: is told (done, all) as sentences are decoded.
    """
    kind = run.task["kind"]
    if kind == "language_model" and source:
        _check_files(kind, source, target)
        return _text_perplexity(run, read_text(source))
    pairs = _read_pairs(run, source, target)
    if kind == "sequence_to_sequence":
        return _translation(run, pairs, beams, on_progress)
    if kind == "classification":
        return metrics.classification(classify(run, [text for text, _ in pairs]), [c for _, c in pairs], run.task["labels"])
    return _continuation_perplexity(run, pairs)


def compare_runs(
    run: Run,
    other: Run,
    *,
    source: Path | None = None,
    target: Path | None = None,
    beams: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """The metrics of two runs of one task on the same examples: ``run``'s held-out ones, or the files'.

    Raises:
        DataError: the runs are of different tasks, or their language models are asked for files.
    """
    for key in ("kind", "metric", "labels"):
        if run.task[key] != other.task[key]:
            raise DataError(f"runs of different tasks cannot be compared: {key} {run.task[key]!r} and {other.task[key]!r}")
    pairs = _read_pairs(run, source, target)
    sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
    if run.task["kind"] == "language_model":
        return [paired_bootstrap("perplexity", perplexity_score, (_continuation_nats(r, pairs) for r in (run, other)))]
    if run.task["kind"] == "classification":
        hits = (hit_statistics(classify(r, sources), targets) for r in (run, other))
        return [paired_bootstrap("accuracy", hit_rate, hits)]
    outputs = [translate(r, sources, beams, on_progress) for r in (run, other)]
    comparisons = [paired_bootstrap("exact_match", hit_rate, (hit_statistics(texts, targets) for texts in outputs))]
    metric = run.task["metric"]
    if metric != "exact_match":
        ngrams = (bleu_statistics(texts, targets, tokenized=metric == "tokenized_bleu") for texts in outputs)
        comparisons.insert(0, paired_bootstrap(metric, bleu_score, ngrams))
    return comparisons


def _read_pairs(run: Run, source: Path | None, target: Path | None) -> list[tuple[str, str]]:
    """Each text with what is wanted: its translation, its label, its continuation."""
    kind = run.task["kind"]
    _check_files(kind, source, target)
    if source is None:
        return [(e["source"], e["label" if kind == "classification" else "target"]) for e in run.held_out]
    if kind == "sequence_to_sequence":
        assert target
        return read_parallel(source, target)
    if kind == "classification":
        labels = run.task["labels"]
        return [(text, labels[c]) for text, c in read_labelled(source, labels)]
    raise DataError("language models are compared on the run's held-out continuations: leave the source out")


def _check_files(kind: str, source: Path | None, target: Path | None) -> None:
    if (target is None) != (source is None or kind != "sequence_to_sequence"):
        raise DataError(f"a {kind} run needs {'source and target' if kind == 'sequence_to_sequence' else 'a source alone'}")


def greedy_metric(model: Transformer, tokenizer: Tokenizer, metric: str, examples: Sequence[Example], max_tokens: int) -> float:
    """The task's metric of greedy outputs, decoded in batches: quick enough for every evaluation of a training."""
    outputs = greedy_batch(model, [example.input for example in examples], max_tokens)
    texts = [tokenizer.decode(ids) for ids in outputs]
    return metrics.TEXT_METRICS[metric](texts, [tokenizer.decode(list(example.output)) for example in examples])


def _translation(
    run: Run, pairs: Sequence[tuple[str, str]], beams: int, on_progress: Callable[[int, int], None] | None
) -> dict[str, float]:
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    outputs = translate(run, sources, beams, on_progress)
    result = {"exact_match": metrics.exact_match(outputs, targets)}
    result[run.task["metric"]] = metrics.TEXT_METRICS[run.task["metric"]](outputs, targets)
    result["chrf"] = metrics.chrf(outputs, targets)
    return result


def translate(
    run: Run, sources: Sequence[str], beams: int = 1, on_progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """The model's output for each source."""
    inputs = [_source_ids(run, text) for text in sources]
    max_tokens = min(run.generation["max_tokens"], run.config.max_target_length)
    if beams == 1:
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        decoded = greedy_batch(run.model, [inputs[i] for i in order], max_tokens)
        outputs = dict(zip(order, decoded, strict=True))
        return [run.tokenizer.decode(outputs[i]) for i in range(len(inputs))]
    texts = []
    for done, ids in enumerate(inputs, 1):
        best = beam_search(run.model, ids, beams=beams, max_tokens=max_tokens, length_penalty=run.generation["length_penalty"])[
            0
        ]
        texts.append(run.tokenizer.decode(best.text_tokens))
        if on_progress:
            on_progress(done, len(inputs))
    return texts


def _source_ids(run: Run, text: str) -> list[int]:
    """What the encoder reads; a text too long for the model loses its end."""
    return [*run.tokenizer.encode_text(text)[: run.config.max_source_length - 1], Tokenizer.EOS]


@torch.no_grad()
def classify(run: Run, texts: Sequence[str]) -> list[str]:
    """The most probable label of each text."""
    outputs, device = [], next(run.model.parameters()).device
    for text in texts:
        ids = _source_ids(run, text)
        logits = run.model.classify(*(torch.tensor([x], device=device) for x in (ids, len(ids)))).logits  # [1, C]
        assert logits is not None
        outputs.append(run.task["labels"][int(logits.argmax())])
    return outputs


def _text_perplexity(run: Run, text: str) -> dict[str, float]:
    """Of a text cut into stretches of the model's context, each read from its own beginning."""
    tokens = run.tokenizer.encode_text(text)
    if len(tokens) < 2:
        raise DataError("the text has fewer than 2 tokens")
    examples = Windows(np.array(tokens, np.int32), run.config.max_target_length)
    epoch = Corpus(examples=lambda _: examples, kind="language_model", batch_tokens=_BATCH_TOKENS, seed=0).epoch(0)
    nats = validate(run.model, epoch).loss
    return _perplexity(nats, nats * (len(tokens) - 1), len(run.tokenizer.decode(tokens[1:])))


def _continuation_perplexity(run: Run, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of each held-out continuation, given its prompt."""
    nats, tokens = _continuation_nats(run, pairs).sum(0)
    return _perplexity(nats / tokens, nats, sum(len(text) for _, text in pairs))


def _continuation_nats(run: Run, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    """[N, 2]: -log p of each continuation given its prompt, and its tokens."""
    rows = []
    for text, following in pairs:
        prompt = run.tokenizer.encode_text(text)
        continuation = run.tokenizer.encode_text(following)[: run.config.max_target_length - len(prompt)]
        rows.append((-sum(score(run.model, prompt, continuation)), len(continuation)))
    return np.array(rows, dtype=np.float64)


def _perplexity(nats_per_token: float, nats: float, characters: int) -> dict[str, float]:
    return {
        "nats_per_token": nats_per_token,
        "nats_per_character": nats / max(1, characters),
        "perplexity": math.exp(min(nats_per_token, 700.0)),
    }
