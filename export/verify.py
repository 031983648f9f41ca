"""The parity certificate: every stage from training to serving, compared with the one before it on real inputs.

    PyTorch, whole sequences -> PyTorch, token by token -> ONNX alone -> ONNX beside ragged neighbours (-> chunked prefill)

For each stage the largest logit difference and the share of positions where the best token is the same; at the end the task's
own metric, computed from what each side generates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.bundle import KnownAnswers
from export.graph_runner import BOS, EOS, ClassifyGraphs, SequenceGraphs
from export.known_answers import of_classifier, of_sequences
from model import metrics
from model.alignment import alignment_weights
from model.checkpoint import Run
from model.decode import Incremental, greedy_batch

LOGIT_INPUTS = 24
"""Inputs whose every logit is compared."""
METRIC_INPUTS = 1000
"""Inputs from which the task's metric is computed: so many that a tenth of a percent can be seen."""
RAGGED_BATCH = 8
MAX_LOGIT_DIFFERENCE = {"fp32": 1e-4, "fp16": 0.1, "int8": 3.0}
MIN_IDENTICAL_TOKENS = {"fp32": 0.999, "fp16": 0.99, "int8": 0.95}
MAX_METRIC_LOSS = {"fp32": 0.1, "fp16": 0.2, "int8": 0.5}
"""In points of the metric, 0 to 100 (perplexity: nats)."""
MAX_WEIGHT_DIFFERENCE = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.5}
"""Of attention, of which there is 1 for each output token."""
MAX_SHORTLIST_LOSS = 0.1
"""In points of the metric: what generating without the other tokens may cost."""

Logits = list[NDArray[np.float32]]


@dataclass(slots=True)
class Certificate:
    """Collects findings; ``to_dict`` is what a manifest holds."""

    precision: str
    inputs: int
    stages: list[dict[str, Any]] = field(default_factory=list)
    metric: dict[str, Any] = field(default_factory=dict)
    shortlist: dict[str, Any] = field(default_factory=dict)
    """What it costs: see ``export.shortlist.shortlist_cost``; empty without one."""
    alignment: dict[str, Any] = field(default_factory=dict)
    """Attention from PyTorch and from the graph; empty without one."""

    def compare(self, stage: str, against: str, found: Logits, wanted: Logits) -> None:
        # np.max, because the built-in max forgets a NaN that is not the first.
        difference = float(np.max([np.abs(f - w).max() for f, w in zip(found, wanted, strict=True)]))
        same = np.concatenate([f.argmax(-1) == w.argmax(-1) for f, w in zip(found, wanted, strict=True)])
        self.stages.append(
            {
                "stage": stage,
                "against": against,
                "max_logit_difference": difference,
                "identical_tokens": float(same.mean()),
                "positions": len(same),
            }
        )

    def compare_attention(self, found: Logits, wanted: Logits) -> None:
        same = np.concatenate([f.argmax(-1) == w.argmax(-1) for f, w in zip(found, wanted, strict=True)])
        self.alignment = {
            "max_weight_difference": float(np.max([np.abs(f - w).max() for f, w in zip(found, wanted, strict=True)])),
            "identical_positions": float(same.mean()),
            "positions": len(same),
        }

    @property
    def failures(self) -> list[str]:
        """Which thresholds are missed, in words."""
        most, least = MAX_LOGIT_DIFFERENCE[self.precision], MIN_IDENTICAL_TOKENS[self.precision]
        found = [] if self.stages else ["nothing was compared"]
        for stage in self.stages:
            # Written so that a NaN fails.
            if not stage["max_logit_difference"] <= most:
                found.append(f"{stage['stage']}: logits differ by {stage['max_logit_difference']:.2g}, more than {most:g}")
            if not stage["identical_tokens"] >= least:
                found.append(f"{stage['stage']}: {stage['identical_tokens']:.4%} of tokens are the same, less than {least:.1%}")
        if self.metric and not self.metric["loss"] <= MAX_METRIC_LOSS[self.precision]:
            found.append(f"{self.metric['name']} falls from {self.metric['pytorch']:.2f} to {self.metric['onnx']:.2f}")
        if (cost := self.shortlist) and not cost["loss"] <= MAX_SHORTLIST_LOSS:
            found.append(f"the shortlist takes {cost['name']} from {cost['whole']:.2f} to {cost['shortlist']:.2f}")
        if (own := self.alignment) and not own["max_weight_difference"] <= MAX_WEIGHT_DIFFERENCE[self.precision]:
            found.append(f"attention differs by {own['max_weight_difference']:.2g}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "passed": not self.failures,
            "failures": self.failures,
            "inputs": self.inputs,
            "thresholds": {
                "max_logit_difference": MAX_LOGIT_DIFFERENCE[self.precision],
                "identical_tokens": MIN_IDENTICAL_TOKENS[self.precision],
                "metric_loss": MAX_METRIC_LOSS[self.precision],
                "shortlist_loss": MAX_SHORTLIST_LOSS,
                "max_weight_difference": MAX_WEIGHT_DIFFERENCE[self.precision],
            },
            "stages": self.stages,
            "metric": self.metric,
            "shortlist": self.shortlist,
            "alignment": self.alignment,
        }


def verify(run: Run, graphs: Path, precision: str, shortlist: Sequence[int] | None = None) -> tuple[Certificate, KnownAnswers]:
    """Compares the exported graphs of ``precision`` with the run they came from, on the run's held-out examples.

    Args:
        shortlist: the tokens whose logits the graphs compute; None: all.

    Returns:
        What was found, and the answers by which another machine can tell whether it computes the same.
    """
    inputs, targets = _examples(run)
    if run.config.has_decoder:
        sequences = SequenceGraphs(graphs, run.config, shortlist)
        certificate = _verify_sequences(run, sequences, precision, inputs, targets)
        return certificate, of_sequences(sequences, precision, inputs)
    classifier = ClassifyGraphs(graphs, run.config)
    return _verify_classifier(run, classifier, precision, inputs), of_classifier(classifier, precision, inputs)


def _examples(run: Run) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the held-out inputs and targets, cut to the model's limits."""
    config, tokenizer = run.config, run.tokenizer
    inputs, targets = [], []
    for example in run.held_out[:METRIC_INPUTS]:
        ids, target = tokenizer.encode_text(example["source"]), list[int]()
        ids = [*ids[: config.max_source_length - 1], EOS] if config.has_encoder else ids[: config.max_target_length // 2]
        if config.has_decoder:
            target = tokenizer.encode_text(example["target"])
            room = config.max_target_length - (0 if config.has_encoder else len(ids))
            target = ([*target, EOS] if config.has_encoder else target)[:room]
        if config.has_encoder or (ids and target):  # a prompt or continuation without tokens says nothing
            inputs.append(ids)
            targets.append(target)
    return inputs, targets


def _verify_sequences(
    run: Run, graphs: SequenceGraphs, precision: str, inputs: list[list[int]], targets: list[list[int]]
) -> Certificate:
    some, wanted = inputs[:LOGIT_INPUTS], targets[:LOGIT_INPUTS]
    certificate = Certificate(precision, len(some))
    if not some:
        return certificate
    whole = [_whole_logits(run, i, t)[:, graphs.ids] for i, t in zip(some, wanted, strict=True)]
    stepped = [_stepped_logits(run, i, t)[:, graphs.ids] for i, t in zip(some, wanted, strict=True)]
    certificate.compare("pytorch incremental", "pytorch full forward", stepped, whole)
    alone = [graphs.forced([i], [t])[0] for i, t in zip(some, wanted, strict=True)]
    certificate.compare(f"onnx {precision}", "pytorch incremental", alone, stepped)
    ragged = []
    for begin in range(0, len(some), RAGGED_BATCH):
        batch = slice(begin, begin + RAGGED_BATCH)
        ragged += graphs.forced(some[batch], wanted[batch], stagger=2)
    certificate.compare(f"onnx {precision} beside ragged neighbours", f"onnx {precision}", ragged, alone)
    if not run.config.has_encoder:
        chunked = [graphs.forced([i], [t], chunk=5)[0] for i, t in zip(some, wanted, strict=True)]
        certificate.compare(f"onnx {precision} with chunked prefill", f"onnx {precision}", chunked, alone)
    if graphs.aligner is not None:
        aligned = [graphs.align(i, [t])[0] for i, t in zip(some, wanted, strict=True)]
        trained = [alignment_weights(run.model, i, t).numpy() for i, t in zip(some, wanted, strict=True)]
        certificate.compare_attention(aligned, trained)
    if run.task["metric"] == "perplexity":
        certificate.metric = _perplexity_metric(whole, alone, wanted)
    else:
        certificate.metric = _generation_metric(run, graphs, inputs)
    return certificate


@torch.no_grad()
def _whole_logits(run: Run, input_ids: Sequence[int], target: Sequence[int]) -> NDArray[np.float32]:
    """[T, V] from one forward pass over the whole target."""
    if run.config.has_encoder:
        source, lengths = torch.tensor([input_ids]), torch.tensor([len(input_ids)])
        return run.model(source, lengths, torch.tensor([[BOS, *target[:-1]]]))[0].numpy()
    return run.model(torch.tensor([[*input_ids, *target[:-1]]]))[0, len(input_ids) - 1 :].numpy()


@torch.no_grad()
def _stepped_logits(run: Run, input_ids: Sequence[int], target: Sequence[int]) -> NDArray[np.float32]:
    """[T, V] from the reference decoder, one token at a time."""
    decoder = Incremental(run.model, input_ids)
    rows = [decoder.start_logits()]
    rows += [decoder.step_logits([0], [token]) for token in target[:-1]]
    return torch.cat(rows).numpy()


def _generation_metric(run: Run, graphs: SequenceGraphs, inputs: list[list[int]]) -> dict[str, Any]:
    """The task's metric of greedy outputs, from PyTorch and from the graphs."""
    max_tokens = min(run.generation["max_tokens"], run.config.max_target_length)
    targets = [example["target"] for example in run.held_out[: len(inputs)]]
    from_pytorch = greedy_batch(run.model, inputs, max_tokens)
    from_onnx: list[list[int]] = []
    for begin in range(0, len(inputs), 32):
        from_onnx += graphs.greedy(inputs[begin : begin + 32], max_tokens)
    measure = metrics.TEXT_METRICS[run.task["metric"]]
    before, after = (measure([run.tokenizer.decode(o) for o in side], targets) for side in (from_pytorch, from_onnx))
    return _metric(
        f"{run.task['metric']} (greedy)",
        before,
        after,
        loss=before - after,
        inputs=len(inputs),
        identical_outputs=float(np.mean([a == b for a, b in zip(from_pytorch, from_onnx, strict=True)])),
    )


def _perplexity_metric(before: Logits, after: Logits, targets: list[list[int]]) -> dict[str, Any]:
    def nats(sides: Logits) -> float:
        scores = [torch.from_numpy(side).log_softmax(-1) for side in sides]
        picked = [s[torch.arange(len(t)), torch.tensor(t)] for s, t in zip(scores, targets, strict=True)]
        return -float(torch.cat(picked).mean())

    first, second = nats(before), nats(after)
    return _metric("nats a token", first, second, loss=second - first, inputs=len(targets))


def _metric(name: str, before: float, after: float, *, loss: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "pytorch": before, "onnx": after, "loss": loss, **more}


def _verify_classifier(run: Run, graphs: ClassifyGraphs, precision: str, inputs: list[list[int]]) -> Certificate:
    some = inputs[:LOGIT_INPUTS]
    certificate = Certificate(precision, len(some))
    trained = [_classified(run, ids) for ids in some]
    alone = [graphs.run([ids]) for ids in some]
    certificate.compare(f"onnx {precision}", "pytorch", alone, trained)
    padded: Logits = []
    for begin in range(0, len(some), RAGGED_BATCH):
        padded += list(graphs.run(some[begin : begin + RAGGED_BATCH])[:, None])
    certificate.compare(f"onnx {precision} beside ragged neighbours", f"onnx {precision}", padded, alone)
    if labels := run.task["labels"]:
        wanted = [example["label"] for example in run.held_out[: len(inputs)]]
        classes = len(labels)
        before = metrics.exact_match([labels[_classified(run, ids)[0, :classes].argmax()] for ids in inputs], wanted)
        after = metrics.exact_match([labels[graphs.run([ids])[0, :classes].argmax()] for ids in inputs], wanted)
        certificate.metric = _metric("accuracy", before, after, loss=before - after, inputs=len(inputs))
    return certificate


@torch.no_grad()
def _classified(run: Run, input_ids: Sequence[int]) -> NDArray[np.float32]:
    """Class probabilities and vector of one text, side by side, [1, C + D]."""
    logits, pooled = run.model.classify(torch.tensor([input_ids]), torch.tensor([len(input_ids)]))
    parts = [pooled] if logits is None else [logits.softmax(-1), pooled]
    return torch.cat(parts, dim=-1).numpy()
