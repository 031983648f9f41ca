"""Runs exported graphs the plain way, for checking them: no scheduler, no server, one loop.

Shapes: B rows, T tokens, S source positions, V vocabulary (or shortlist), as in ``export.graphs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.bundle import session_config
from model.config import ModelConfig

Array = NDArray[Any]
BOS, EOS = 1, 2


def open_graph(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for name, value in session_config().items():
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def pad(sequences: Sequence[Sequence[int]]) -> dict[str, Array]:
    """The inputs of an ``encode`` graph."""
    lengths = np.array([len(s) for s in sequences], np.int32)
    source = np.zeros((len(sequences), int(lengths.max())), np.int64)
    for row, sequence in zip(source, sequences, strict=True):
        row[: len(sequence)] = sequence
    return {"source": source, "last": lengths - 1, "total": np.array(source.shape[1], np.int32)}


class SequenceGraphs:
    """The graphs of a model with a decoder, and caches for some rows.

    Args:
        shortlist: the tokens whose logits the graphs compute, rising; None: all.

    Attributes:
        ids: the token of each logit.
    """

    def __init__(self, folder: Path, config: ModelConfig, shortlist: Sequence[int] | None = None) -> None:
        self.ids = np.arange(config.vocab_size) if shortlist is None else np.array(shortlist)
        self.config = config
        self.encoder = open_graph(folder / "encode.onnx") if config.has_encoder else None
        self.decoder = open_graph(folder / "decode.onnx")
        self.aligner = open_graph(folder / "align.onnx") if (folder / "align.onnx").exists() else None
        kind = next(i.type for i in self.decoder.get_inputs() if i.name == "self_key_0")
        self.dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}[kind]
        (self.width,) = (o.shape[1] for o in self.decoder.get_outputs() if o.name == "logits")

    def start(self, inputs: Sequence[Sequence[int]], chunk: int | None = None) -> None:
        """Makes caches for these inputs: encodes sources, or prefills prompts but for their last token.

        Args:
            chunk: prefill at most this many tokens at a time.
        """
        c = self.config
        shape = (2 * c.decoder_layers, len(inputs), c.key_value_heads, c.max_target_length, c.head_width)
        self.self_caches = np.zeros(shape, self.dtype)
        if self.encoder is not None:
            feeds = pad(inputs)
            (cross,) = self.encoder.run(None, feeds)  # [L, 2, B, G, S, K]
            self.cross_caches, self.source_last = cross.reshape(-1, *cross.shape[2:]), feeds["last"]
        else:
            for row, prompt in enumerate(inputs):
                head = np.array(prompt[:-1], np.int64)
                for begin in range(0, len(head), chunk or max(1, len(head))):
                    part = head[begin : begin + (chunk or len(head))]
                    self._run(slice(row, row + 1), part[None], begin + np.arange(len(part))[None])

    def step(self, tokens: Array, positions: Array) -> tuple[Array, Array]:
        """Feeds one token to each of the first B rows; the best next token [B] and the logits [B, V] of ``ids``."""
        return self._run(slice(0, len(tokens)), tokens[:, None], positions[:, None])

    def _run(self, rows: slice, tokens: Array, positions: Array) -> tuple[Array, Array]:
        last = positions[:, -1].astype(np.int32)
        feeds = {
            "tokens": np.ascontiguousarray(tokens),
            "positions": np.ascontiguousarray(positions),
            "last": last,
            "total": np.array(last.max() + 1, np.int32),
            "top_k": np.array([1], np.int64),
        }
        outputs: dict[str, Array] = {
            "top_log_probabilities": np.empty((len(last), 1), np.float32),
            "top_ids": np.empty((len(last), 1), np.int64),
            "logits": np.empty((len(last), self.width), np.float32),
        }
        caches = dict(zip(self._cache_names("self"), self.self_caches, strict=True))
        if self.encoder is not None:
            caches |= dict(zip(self._cache_names("cross"), self.cross_caches, strict=True))
            source_last = self.source_last[rows]
            feeds |= {
                "source_last": source_last,
                "source_total": np.array(source_last.max() + 1, np.int32),
            }
        for name, cache in caches.items():
            feeds[name] = outputs[f"{name}_out"] = cache[rows]  # one buffer: the graph appends in place
        binding = self.decoder.io_binding()
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self.decoder.run_with_iobinding(binding)
        return outputs["top_ids"][:, 0], outputs["logits"][:, : len(self.ids)]

    def _cache_names(self, kind: str) -> list[str]:
        return [f"{kind}_{what}_{i}" for i in range(self.config.decoder_layers) for what in ("key", "value")]

    def forced(
        self, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], *, stagger: int = 0, chunk: int | None = None
    ) -> list[Array]:
        """Logits [T, V] of every target, fed token by token, all inputs in one batch.

        Args:
            stagger: input i joins i * stagger steps later than the first, so that rows of different ages share the batch.
        """
        self.start(inputs, chunk)
        fed = [self._first(ids) + list(target[:-1]) for ids, target in zip(inputs, targets, strict=True)]
        begins = np.array([0 if self.encoder else len(ids) - 1 for ids in inputs])
        logits: list[list[Array]] = [[] for _ in inputs]
        for step in range(max(i * stagger + len(row) for i, row in enumerate(fed))):
            joined = len(inputs) if not stagger else min(len(inputs), step // stagger + 1)
            ages = np.array([min(step - i * stagger, len(fed[i]) - 1) for i in range(joined)])  # ended rows repeat their last
            _, out = self.step(np.array([fed[i][age] for i, age in enumerate(ages)]), begins[:joined] + ages)
            for i in range(joined):
                if step - i * stagger < len(fed[i]):
                    logits[i].append(out[i])
        return [np.stack(rows) for rows in logits]

    def greedy(self, inputs: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy outputs of a batch, without the end-of-text token."""
        self.start(inputs)
        tokens = np.array([self._first(ids)[0] for ids in inputs])
        begins = np.array([0 if self.encoder else len(ids) - 1 for ids in inputs])
        produced = []
        for step in range(max_tokens):
            tokens, _ = self.step(tokens, begins + step)
            produced.append(tokens)
            if (np.array(produced) == EOS).any(axis=0).all():
                break
        rows = np.array(produced).T.tolist()
        return [row[: row.index(EOS)] if EOS in row else row for row in rows]

    def align(self, source: Sequence[int], outputs: Sequence[Sequence[int]]) -> list[Array]:
        """Where the decoder looked in ``source``, [T, S], while it wrote each of ``outputs``."""
        assert self.encoder is not None
        assert self.aligner is not None
        (cross,) = self.encoder.run(None, pad([source]))
        feeds = pad([[BOS, *output[:-1]] for output in outputs])
        feeds["tokens"] = feeds.pop("source")
        (weights,) = self.aligner.run(None, feeds | {"cross": cross})
        return [rows[: len(output)] for rows, output in zip(weights, outputs, strict=True)]

    def _first(self, input_ids: Sequence[int]) -> list[int]:
        return [BOS] if self.encoder else [input_ids[-1]]


class ClassifyGraphs:
    """The graph of an encoder-only model."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.session = open_graph(folder / "encode.onnx")

    def run(self, inputs: Sequence[Sequence[int]]) -> Array:
        """Class probabilities [B, C] and vectors [B, D], side by side."""
        return np.concatenate(self.session.run(None, pad(inputs)), axis=1)
