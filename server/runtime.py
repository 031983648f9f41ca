"""ONNX Runtime and the memory it works on. The only file that imports onnxruntime.

The caches belong to this file, not to a session: every layer's keys and values are one array of fixed capacity, bound as
input and output of the decode graph at once, so a step appends in place and allocates nothing. Bindings are kept for each
number of rows.

Shapes: R row capacity, B rows of a call, L layers, G key/value heads, C capacity (longest target), S longest source,
K head width, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from server.kv_cache import Rows
from server.sequence_model import Candidates, SequenceShape


class RuntimeUnavailable(Exception):
    """The device or the model cannot be brought up: one line saying why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    device: str = "cpu"
    threads: int = 0
    """Threads of one session; 0: as many as there are cores."""
    spinning: bool = True
    """Idle threads spin for the next operator: faster steps, at the price of the cores while they wait."""


def choose_device(asked: str) -> str:
    """``auto`` takes CUDA where ONNX Runtime can use it.

    Raises:
        RuntimeUnavailable: when CUDA is asked for and is not there.
    """
    cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if asked == "cuda" and not cuda:
        raise RuntimeUnavailable(
            "--device cuda: this installation of ONNX Runtime has no CUDA provider (install the gpu extra)"
        )
    return "cuda" if cuda and asked in ("auto", "cuda") else "cpu"


def open_session(path: Path, settings: SessionSettings) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spinning else "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime raises a dozen types of its own, none of them public
        raise RuntimeUnavailable(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from None


class SequenceRuntime:
    """A ``SequenceModel``: the sessions of a model with a decoder, and its caches."""

    def __init__(self, graphs: Path, shape: SequenceShape, rows: int, settings: SessionSettings) -> None:
        self.shape, self.rows = shape, rows
        self._decode = open_session(graphs / "decode.onnx", settings)
        self._encode = open_session(graphs / "encode.onnx", settings) if shape.longest_source else None
        s = shape
        # The row behind the last one is the staging row: a prompt is prefilled there while the others run.
        self._staging = rows
        total_rows = rows + (0 if s.longest_source else 1)
        self._self = np.zeros((s.layers, 2, total_rows, s.kv_heads, s.longest_target, s.head_width), np.float32)
        self._cross = np.zeros(
            (s.layers, 2, rows if s.longest_source else 0, s.kv_heads, s.longest_source, s.head_width), np.float32
        )
        self._newest = np.zeros((rows, s.layers, 2, s.kv_heads * s.head_width), np.float32)
        self._tokens = np.zeros((rows, 1), np.int64)
        self._positions = np.zeros((rows, 1), np.int64)
        self._last = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._source_last = np.zeros(rows, np.int32)
        self._source_total = np.zeros((), np.int32)
        self._logits = np.zeros((rows, s.vocab_size), np.float32)
        self._top_k = {k: np.array([k], np.int64) for k in self.top_k_choices}
        self._steps: dict[tuple[int, int], tuple[ort.IOBinding, Candidates]] = {}

    @property
    def top_k_choices(self) -> list[int]:
        # Few, because each has its own bindings.
        return sorted({min(k, self.shape.vocab_size) for k in (1, 2, 4, 8, 16, 32, 64)})

    def encode(self, sources: Sequence[Sequence[int]], rows: Sequence[Rows]) -> None:
        assert self._encode is not None
        padded, lengths = _pad(sources)
        last, total = lengths - 1, np.array(padded.shape[1], np.int32)
        *caches, newest = self._encode.run(None, {"source": padded, "last": last, "total": total})
        for i, own in enumerate(rows):
            length = lengths[i]
            for j, cache in enumerate(caches):  # [B, G, S, K]
                self._cross[j // 2, j % 2, own, :, :length] = cache[i, :, :length]
            self._newest[own] = newest[i]
            self._source_last[own] = last[i]

    def prefill(self, tokens: Sequence[int], start: int) -> None:
        n, row = len(tokens), self._staging
        binding = self._decode.io_binding()
        positions = np.arange(start, start + n)[None]
        inputs: dict[str, NDArray[Any]] = {
            "tokens": np.array([tokens], np.int64),
            "positions": positions,
            "last": positions[:, -1].astype(np.int32),
            "total": np.array(start + n, np.int32),
            "top_k": np.ones(1, np.int64),
        }
        scratch: dict[str, NDArray[Any]] = {
            "top_log_probabilities": np.empty((1, 1), np.float32),
            "top_ids": np.empty((1, 1), np.int64),
            "logits": np.empty((1, self.shape.vocab_size), np.float32),
        }
        for name, array in inputs.items():
            _bind_input(binding, name, array)
        for name, array in scratch.items():
            _bind_output(binding, name, array)
        self._bind_self_caches(binding, slice(row, row + 1))
        self._decode.run_with_iobinding(binding)

    def adopt(self, rows: Rows, length: int) -> None:
        self._self[:, :, rows, :, :length] = self._self[:, :, self._staging : self._staging + 1, :, :length]

    def decode(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], top_k: int) -> Candidates:
        n = len(tokens)
        self._tokens[:n, 0] = tokens
        self._positions[:n, 0] = positions
        self._last[:n] = positions
        self._total[...] = positions.max() + 1
        if self._encode is not None:
            self._source_total[...] = self._source_last[:n].max() + 1
        binding, candidates = self._steps.get((n, top_k)) or self._bind_step(n, top_k)
        self._decode.run_with_iobinding(binding)
        return candidates

    def logits(self, rows: Rows) -> NDArray[np.float32]:
        return self._logits[rows]

    def branch(self, source: Rows, target: Rows, length: int) -> None:
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            self._self[:, :, t, :, :length] = self._self[:, :, s, :, :length]

    def move(self, source: Rows, target: Rows, length: int) -> None:
        self.branch(source, target, length)
        if self._encode is not None:
            longest = int(self._source_last[source].max(initial=-1)) + 1
            for s, t in zip(source.tolist(), target.tolist(), strict=True):
                self._cross[:, :, t, :, :longest] = self._cross[:, :, s, :, :longest]
            self._newest[target] = self._newest[source]
            self._source_last[target] = self._source_last[source]

    def _bind_step(self, n: int, top_k: int) -> tuple[ort.IOBinding, Candidates]:
        binding = self._decode.io_binding()
        for name, array in (
            ("tokens", self._tokens[:n]),
            ("positions", self._positions[:n]),
            ("last", self._last[:n]),
            ("total", self._total),
            ("top_k", self._top_k[top_k]),
        ):
            _bind_input(binding, name, array)
        self._bind_self_caches(binding, slice(0, n))
        if self._encode is not None:
            _bind_input(binding, "source_last", self._source_last[:n])
            _bind_input(binding, "source_total", self._source_total)
            _bind_input(binding, "newest", self._newest[:n])
            self._bind_caches(binding, "cross", self._cross, slice(0, n))
        candidates = Candidates(np.zeros((n, top_k), np.int64), np.zeros((n, top_k), np.float32))
        _bind_output(binding, "top_ids", candidates.ids)
        _bind_output(binding, "top_log_probabilities", candidates.log_probabilities)
        _bind_output(binding, "logits", self._logits[:n])
        self._steps[n, top_k] = binding, candidates
        return binding, candidates

    def _bind_self_caches(self, binding: ort.IOBinding, rows: slice) -> None:
        self._bind_caches(binding, "self", self._self, rows)

    def _bind_caches(self, binding: ort.IOBinding, kind: str, memory: NDArray[np.float32], rows: slice) -> None:
        for layer in range(self.shape.layers):
            for i, what in enumerate(("key", "value")):
                name, view = f"{kind}_{what}_{layer}", memory[layer, i, rows]
                _bind_input(binding, name, view)
                _bind_output(binding, f"{name}_out", view)


class EncodingRuntime:
    """An encoder-only model: class probabilities and vectors."""

    def __init__(self, graphs: Path, settings: SessionSettings, *, classes: int) -> None:
        self._session = open_session(graphs / "encode.onnx", settings)
        self.classes = classes

    def encode(self, sources: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Class probabilities [B, C] (C = 0 without a classification head) and vectors [B, D]."""
        padded, lengths = _pad(sources)
        outputs = self._session.run(None, {"source": padded, "last": lengths - 1, "total": np.array(padded.shape[1], np.int32)})
        probabilities = outputs[0] if self.classes else np.zeros((len(sources), 0), np.float32)
        return probabilities, outputs[-1]


def _pad(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """[B, S] padded with zeros, and lengths [B]."""
    lengths = np.array([len(s) for s in sequences], np.int32)
    padded = np.zeros((len(sequences), int(lengths.max())), np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded, lengths


def _bind_input(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
