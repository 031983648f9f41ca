"""How results look in a terminal; one function for each command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from server.client.types import Classification, Embedding, Generation, Hypothesis, ModelInfo, Score, Tokenization


def as_json(results: Sequence[object]) -> str:
    """Everything the server said: one object for each result."""
    return "\n".join(json.dumps(asdict(result), ensure_ascii=False) for result in results)  # type: ignore[call-overload]


def generations(results: Sequence[Generation], *, every: bool) -> str:
    """The best text of each input; with ``every``, all hypotheses with their probabilities, an empty line between inputs.

    An alignment follows its text as fast_align writes it: source-output, counted from 0.
    """
    if not every:
        return "\n".join(_output(result.hypotheses[0]) for result in results)
    return "\n\n".join("\n".join(f"{h.probability:.4f}  {_output(h)}" for h in result.hypotheses) for result in results)


def _output(hypothesis: Hypothesis) -> str:
    if not hypothesis.alignment:
        return hypothesis.text
    return f"{hypothesis.text} ||| {' '.join(f'{source}-{i}' for i, source in enumerate(hypothesis.alignment))}"


def classifications(results: Sequence[Classification]) -> str:
    return "\n\n".join("\n".join(f"{c.probability:.4f}  {c.label}" for c in result.classes) for result in results)


def embeddings(results: Sequence[Embedding]) -> str:
    return "\n".join(" ".join(f"{value:.6g}" for value in result.vector) for result in results)


def scores(results: Sequence[Score]) -> str:
    return "\n".join(f"{result.log_probability:.4f}  {result.token_count} tokens" for result in results)


def tokenizations(results: Sequence[Tokenization]) -> str:
    return "\n\n".join(_columns(zip(map(str, result.ids), result.pieces, strict=True)) for result in results)


def models(results: Sequence[ModelInfo]) -> str:
    return "\n\n".join(_model(model) for model in results)


def _model(model: ModelInfo) -> str:
    limits, defaults = model.limits, model.default_options
    facts = [
        ("model", model.name),
        ("family", model.family),
        ("task", model.task),
        ("precision", f"{model.precision} on {model.device}"),
        ("parameters", f"{model.parameters:,}"),
        ("limits", f"{limits.max_inputs} inputs of {limits.max_input_tokens} tokens ({limits.max_text_bytes} bytes)"),
    ]
    if defaults.max_tokens is not None:
        facts.append(("outputs", f"at most {limits.max_output_tokens} tokens, {limits.max_beams} beams"))
        facts.append(
            ("defaults", f"{defaults.beams} beams, {defaults.max_tokens} tokens, length penalty {defaults.length_penalty:g}")
        )
    if model.labels:
        facts.append(("labels", ", ".join(model.labels)))
    facts.append(("fingerprint", model.fingerprint))
    return _columns(facts)


def _columns(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns, the first as wide as its widest entry."""
    table = list(rows)
    width = max((len(left) for left, _ in table), default=0)
    return "\n".join(f"{left:<{width}}  {right}" for left, right in table)
