"""The sessions of a model with a decoder, and the memory they work on.

The caches are bound as input and output of the decode graph at once, so a step appends in place and allocates nothing; bindings
are kept for each number of rows.

Shapes: B rows of a call, S source positions, V vocabulary (the graph's logits may be wider).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.batch.kv_cache import Rows
from server.batch.sequence_model import Candidates, SequenceShape
from server.device.caches import CacheLayout, Caches
from server.device.cuda import CudaError, CudaMemory
from server.device.device_caches import DeviceCaches
from server.device.host_caches import HostCaches
from server.device.session import Arrays, Binding, RuntimeUnavailable, Session, SessionSettings, bind_arrays, open_session, pad

_SOURCES = 4
"""That are encoded together to see what they save."""


class SequenceRuntime:
    """A ``SequenceModel``: the sessions of a model with a decoder, and its caches.

    Args:
        graphs: folder of one precision's graphs.
        caches: for tests; made to fit the device otherwise.
        shortlist: the tokens whose logits the graphs compute, rising; None: all.

    Attributes:
        step_rows: most rows of one run of the graph; a step over more rows takes several. See ``tune``.
        encoding_overhead: as ``SequenceModel``'s; 0 until ``tune``.

    Raises:
        RuntimeUnavailable: when the graphs cannot be loaded or the caches do not fit the device.
    """

    def __init__(
        self,
        graphs: Path,
        shape: SequenceShape,
        rows: int,
        settings: SessionSettings,
        caches: Caches | None = None,
        shortlist: Sequence[int] | None = None,
    ) -> None:
        self.shape, self.rows = shape, rows
        self.step_rows = rows
        self.encoding_overhead = 0.0
        self._shortlist = None if shortlist is None else np.array(shortlist)
        self._outputs = shape.vocab_size if shortlist is None else len(shortlist)
        self._device = settings.device
        self._decode = open_session(graphs / "decode.onnx", settings)
        self._encode = open_session(graphs / "encode.onnx", settings) if shape.has_encoder else None
        align = graphs / "align.onnx"
        self._align = open_session(align, settings) if align.exists() else None
        (self._logits_width,) = (o.shape[1] for o in self._decode.get_outputs() if o.name == "logits")
        self._device_memory = self._open_device() if settings.device == "cuda" else None
        self._caches = caches or self._make_caches()
        self._tokens = np.zeros((rows, 1), np.int64)
        self._positions = np.zeros((rows, 1), np.int64)
        self._last = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._source_last = np.zeros(rows, np.int32)
        self._source_total = np.zeros((), np.int32)
        self._logits = np.zeros((rows, self._logits_width), np.float32)
        # Two for each beam of the usual widths, and one more where the end of text is forbidden.
        self.top_k_choices = sorted({min(k, self._outputs) for k in (1, 2, 4, 5, 8, 9, 10, 11, 16, 17, 32, 33, 64)})
        self._top_k = {k: np.array([k], np.int64) for k in self.top_k_choices}
        self._candidates: dict[int, Candidates] = {}
        self._steps: dict[tuple[int, int, int, bool], Binding] = {}
        # What the caches hold: rows, positions of the longest target, source, and prompt in the staging row.
        self._live = self._longest_target = self._longest_source = self._staged = 0

    def _open_device(self) -> CudaMemory:
        try:
            memory = CudaMemory()
            self._device_logits = memory.allocate(self.rows * self._logits_width * 4)
        except CudaError as error:
            raise RuntimeUnavailable(f"--device cuda: {error}") from None
        return memory

    def _make_caches(self) -> Caches:
        layout = CacheLayout.of(self.shape, self.rows, _cache_type(self._decode))
        if self._device_memory is None:
            return HostCaches(layout)
        try:
            return DeviceCaches(layout, self._device_memory)
        except CudaError as error:
            size = sum(layout.sizes)
            raise RuntimeUnavailable(f"caches of {self.rows} rows ({size / 2**20:,.0f} MiB) on the device: {error}") from None

    def encode(self, sources: Sequence[Sequence[int]], rows: Sequence[Rows]) -> None:
        assert self._encode is not None
        padded, lengths = pad(sources)
        inputs: Arrays = {"source": padded, "last": lengths - 1, "total": np.array(padded.shape[1], np.int32)}
        if self._device_memory is None:
            (cross,) = self._encode.run(["cross"], inputs)  # a binding for one run takes longer than the copy it saves
        else:
            binding = self._encode.io_binding()
            bind_arrays(binding, inputs, {})
            binding.bind_output("cross", self._device, 0)  # what the decoder reads never leaves the device
            self._encode.run_with_iobinding(binding)
            (cross,) = binding.get_outputs()
        self._live = max(self._live, int(rows[-1][-1]) + 1)
        self._longest_source = max(self._longest_source, padded.shape[1])
        self._reserve()
        self._caches.write_source(rows, cross)
        for i, own in enumerate(rows):
            self._source_last[own] = lengths[i] - 1

    def prefill(self, tokens: Sequence[int], start: int) -> None:
        self._staged = start + len(tokens)
        self._reserve()
        binding = self._decode.io_binding()
        positions = np.arange(start, start + len(tokens))[None]
        inputs: Arrays = {
            "tokens": np.array([tokens], np.int64),
            "positions": positions,
            "last": positions[:, -1].astype(np.int32),
            "total": np.array(start + len(tokens), np.int32),
            "top_k": self._top_k[1],
        }
        scratch: Arrays = {
            "top_log_probabilities": np.empty((1, 1), np.float32),
            "top_ids": np.empty((1, 1), np.int64),
            "logits": np.empty((1, self._logits_width), np.float32),
        }
        bind_arrays(binding, inputs, scratch)
        self._bind_caches(binding, slice(self.rows, self.rows + 1))
        self._decode.run_with_iobinding(binding)

    def adopt(self, rows: Rows, length: int) -> None:
        self._caches.adopt(rows, length)
        self._live, self._longest_target = max(self._live, int(rows[-1]) + 1), max(self._longest_target, length)
        self._staged = 0

    def decode(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], top_k: int, *, keep_logits: bool = True
    ) -> Candidates:
        n = len(tokens)
        self._tokens[:n, 0] = tokens
        self._positions[:n, 0] = positions
        self._last[:n] = positions
        self._live, self._longest_target = n, int(positions.max()) + 1
        self._total[...] = self._longest_target
        if self.shape.has_encoder:
            self._source_total[...] = self._longest_source = int(self._source_last[:n].max()) + 1
        self._reserve()
        for begin in range(0, n, self.step_rows):
            key = begin, min(n, begin + self.step_rows), top_k, keep_logits
            binding = self._steps.get(key) or self._bind_step(*key)
            self._decode.run_with_iobinding(binding)
        ids, log_probabilities = self._candidates[top_k]
        return Candidates(ids[:n], log_probabilities[:n])

    def _reserve(self) -> None:
        if self._caches.reserve(max(self._longest_target, self._staged), self._longest_source, self._live):
            self._steps.clear()

    def tune(self) -> None:
        """Sets ``step_rows`` and ``encoding_overhead`` by measurement. Call it before the first request.

        Logits of many rows do not stay in a core's cache between the operators that work on them: on a small model two runs of
        32 rows may take less time than one of 64. On a large one the weights are what is read, and many rows share one reading.
        """
        if self._device_memory is not None:
            return
        # All rows have written some tokens, of a source as long; each size walks through all of their caches.
        age = min(16, self.shape.longest_target) - 1
        self._source_last[:] = min(16, self.shape.longest_source) - 1
        sizes = sorted({min(self.rows, size) for size in (16, 32, 64, 128, 256, self.rows)}, reverse=True)
        # Rounds over all sizes, so that a busy moment of the machine does not meet one size alone.
        times = np.min([[self._time_step(size, age) for size in sizes] for _ in range(8)], axis=0)
        chosen, best = sizes[0], times[0]
        for size, seconds in zip(sizes, times, strict=True):
            if seconds < 0.98 * best:  # fewer rows a run only for a reason
                chosen, best = size, seconds
        self.step_rows = chosen
        if self._encode is not None and self.rows >= _SOURCES:
            # Seconds of k sources are about a + b k; what is wanted is a.
            one, several = np.min([[self._time_encoding(count) for count in (1, _SOURCES)] for _ in range(16)], axis=0)
            self.encoding_overhead = max(0.0, float(_SOURCES * one - several) / (_SOURCES - 1))
        self._source_last[:] = 0

    def _time_step(self, step_rows: int, age: int) -> float:
        """Seconds of a step over all rows in runs of ``step_rows``."""
        self.step_rows, rows = step_rows, self.rows
        started = time.perf_counter()
        self.decode(np.zeros(rows, np.int64), np.full(rows, age), self.top_k_choices[0], keep_logits=False)
        return time.perf_counter() - started

    def _time_encoding(self, count: int) -> float:
        """Seconds of an encoding of so many sources."""
        source = [0] * min(16, self.shape.longest_source)
        started = time.perf_counter()
        self.encode([source] * count, [np.array([row]) for row in range(count)])
        return time.perf_counter() - started

    def logits(self, rows: Rows) -> NDArray[np.float32]:
        if self._device_memory is None:
            logits = self._logits[rows, : self._outputs]
        else:
            fetched = np.empty((len(rows), self._logits_width), np.float32)
            for row, target in zip(rows.tolist(), fetched, strict=True):
                self._device_memory.fetch(self._device_logits + row * target.nbytes, target)
            logits = fetched[:, : self._outputs]
        if self._shortlist is None:
            return logits
        whole = np.full((len(rows), self.shape.vocab_size), -np.inf, np.float32)
        whole[:, self._shortlist] = logits
        return whole

    @property
    def can_align(self) -> bool:
        return self._align is not None

    def align(self, source: Sequence[int], outputs: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Where the decoder looked in ``source``, [T, S], having read the first 1, 2, ... T tokens of each of ``outputs``."""
        assert self._encode is not None
        assert self._align is not None
        padded, lengths = pad([source])
        (cross,) = self._encode.run(None, {"source": padded, "last": lengths - 1, "total": np.array(len(source), np.int32)})
        tokens, lengths = pad(outputs)
        inputs = {"tokens": tokens, "last": lengths - 1, "total": np.array(tokens.shape[1], np.int32), "cross": cross}
        (weights,) = self._align.run(None, inputs)
        return [rows[:length] for rows, length in zip(weights, lengths.tolist(), strict=True)]

    def branch(self, source: Rows, target: Rows, start: NDArray[np.intp], stop: NDArray[np.intp]) -> None:
        self._caches.branch(source, target, start, stop)

    def move(self, source: Rows, target: Rows, length: int) -> None:
        longest_source = int(self._source_last[source].max(initial=-1)) + 1 if self.shape.has_encoder else 0
        self._caches.move(source, target, length, longest_source)
        self._source_last[target] = self._source_last[source]

    def _bind_step(self, begin: int, end: int, top_k: int, keep_logits: bool) -> Binding:
        """The binding of a run over rows ``begin`` to ``end``, made once.

        Logits that nobody wants go to one place in every run, which so stays in the core's cache.
        """
        if top_k not in self._candidates:
            shape = self.rows, top_k
            self._candidates[top_k] = Candidates(np.zeros(shape, np.int64), np.zeros(shape, np.float32))
        candidates, rows = self._candidates[top_k], slice(begin, end)
        binding = self._decode.io_binding()
        inputs: Arrays = {
            "tokens": self._tokens[rows],
            "positions": self._positions[rows],
            "last": self._last[rows],
            "total": self._total,
            "top_k": self._top_k[top_k],
        }
        if self.shape.has_encoder:
            inputs |= {"source_last": self._source_last[rows], "source_total": self._source_total}
        outputs: Arrays = {"top_ids": candidates.ids[rows], "top_log_probabilities": candidates.log_probabilities[rows]}
        first = begin if keep_logits else 0
        if self._device_memory is None:
            outputs["logits"] = self._logits[first : first + end - begin]
        else:
            place = self._device_logits + first * self._logits_width * 4
            binding.bind_output("logits", self._device, 0, np.float32, (end - begin, self._logits_width), place)
        bind_arrays(binding, inputs, outputs)
        self._bind_caches(binding, rows)
        self._steps[begin, end, top_k, keep_logits] = binding
        return binding

    def _bind_caches(self, binding: Binding, rows: slice) -> None:
        for bound in self._caches.views(rows):
            where = self._device, 0, bound.dtype.type, bound.shape, bound.pointer
            binding.bind_input(bound.name, *where)
            binding.bind_output(f"{bound.name}_out", *where)


def _cache_type(decode: Session) -> str:
    return next(_NUMBER_TYPES[value.type] for value in decode.get_inputs() if value.name == "self_key_0")


_NUMBER_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int8)": "int8"}
