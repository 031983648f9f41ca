"""Measures a trained run on its held-out examples, or on files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from model import metrics
from model.batches import Corpus, windows
from model.checkpoint import Run
from model.data import DataError, read_labelled, read_parallel, read_text
from model.decode import beam_search, greedy_batch, score
from model.objective import validate
from model.tokenizer import Tokenizer

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
    if (target is None) != (source is None or kind != "sequence_to_sequence"):
        raise DataError(f"a {kind} run needs {'source and target' if kind == 'sequence_to_sequence' else 'a source alone'}")
    if kind == "sequence_to_sequence":
        pairs = read_parallel(source, target) if source and target else [(e["source"], e["target"]) for e in run.held_out]
        return _translation(run, pairs, beams, on_progress)
    if kind == "classification":
        labels = run.task["labels"]
        examples = (
            [(text, labels[c]) for text, c in read_labelled(source, labels)]
            if source
            else [(e["source"], e["label"]) for e in run.held_out]
        )
        return _classification(run, examples)
    return _text_perplexity(run, read_text(source)) if source else _continuation_perplexity(run, run.held_out)


def _translation(
    run: Run, pairs: Sequence[tuple[str, str]], beams: int, on_progress: Callable[[int, int], None] | None
) -> dict[str, float]:
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    outputs = translate(run, sources, beams, on_progress)
    result = {"exact_match": metrics.exact_match(outputs, targets)}
    if run.task["metric"] == "tokenized_bleu":
        result["tokenized_bleu"] = metrics.tokenized_bleu(outputs, targets)
    elif run.task["metric"] == "bleu":
        result["bleu"] = metrics.bleu(outputs, targets)
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
def _classification(run: Run, examples: Sequence[tuple[str, str]]) -> dict[str, float]:
    outputs, device = [], next(run.model.parameters()).device
    for text, _ in examples:
        ids = _source_ids(run, text)
        logits = run.model.classify(*(torch.tensor([x], device=device) for x in (ids, len(ids)))).logits  # [1, C]
        assert logits is not None
        outputs.append(run.task["labels"][int(logits.argmax())])
    return metrics.classification(outputs, [label for _, label in examples], run.task["labels"])


def _text_perplexity(run: Run, text: str) -> dict[str, float]:
    """Of a text cut into stretches of the model's context, each read from its own beginning."""
    tokens = run.tokenizer.encode_text(text)
    if len(tokens) < 2:
        raise DataError("the text has fewer than 2 tokens")
    examples = windows(tokens, run.config.max_target_length)
    epoch = Corpus(examples=lambda _: examples, kind="language_model", batch_tokens=_BATCH_TOKENS, seed=0).epoch(0)
    nats = validate(run.model, epoch).loss
    return _perplexity(nats, nats * (len(tokens) - 1), len(run.tokenizer.decode(tokens[1:])))


def _continuation_perplexity(run: Run, examples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each held-out continuation, given its prompt."""
    total, tokens = 0.0, 0
    for example in examples:
        prompt, continuation = run.tokenizer.encode_text(example["source"]), run.tokenizer.encode_text(example["target"])
        continuation = continuation[: run.config.max_target_length - len(prompt)]
        total -= sum(score(run.model, prompt, continuation))
        tokens += len(continuation)
    return _perplexity(total / tokens, total, sum(len(example["target"]) for example in examples))


def _perplexity(nats_per_token: float, nats: float, characters: int) -> dict[str, float]:
    return {
        "nats_per_token": nats_per_token,
        "nats_per_character": nats / max(1, characters),
        "perplexity": math.exp(min(nats_per_token, 700.0)),
    }
