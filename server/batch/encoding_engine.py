"""The engine of encoder-only models: whatever waits is encoded together, as soon as the model is free.

The same verbs as ``server.batch.engine.Engine``, so that one loop drives both. A request's result comes out of the step that
takes it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.batch.engine import Addressed
from server.batch.step_stats import StepStats
from server.requests import Encoded, EncodingRequest, Failed, Failure


class EncodingModel(Protocol):
    """What this engine asks of a model; ``server.device.encoding_runtime.EncodingRuntime`` answers with ONNX Runtime."""

    def encode(self, sources: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Class probabilities [B, C] (C may be 0) and vectors [B, D]."""


class EncodingEngine:
    """Batches of waiting inputs, first come first served.

    Args:
        batch_tokens: most tokens of one batch, padding included; a single longer input still goes through alone.
        batch_rows: most inputs of one batch.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: EncodingModel,
        *,
        batch_rows: int,
        batch_tokens: int = 2048,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.batch_rows, self.batch_tokens, self.clock = model, batch_rows, batch_tokens, clock
        self._waiting: OrderedDict[str, tuple[EncodingRequest, float]] = OrderedDict()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def submit(self, request: EncodingRequest) -> None:
        self._waiting[request.id] = request, self.clock()

    def cancel(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)

    def step(self) -> tuple[list[Addressed], StepStats]:
        """Encodes one batch; call it while ``has_work``."""
        started = self.clock()
        batch = self._take_batch()
        running = self.clock()
        probabilities, vectors = self.model.encode([request.input_ids for request, _ in batch])
        ended = self.clock()
        sound = np.isfinite(np.concatenate([vectors, probabilities], axis=1)).all(axis=1)
        events: list[Addressed] = []
        for i, (request, _) in enumerate(batch):
            if bool(sound[i]):
                events.append((request.id, Encoded(tuple(probabilities[i].tolist()), tuple(vectors[i].tolist()))))
            else:
                failed = Failed(Failure.NUMERICS, "the model's scores are not finite for this input")
                events.append((request.id, failed))
        return events, StepStats(
            seconds=self.clock() - started,
            runtime_seconds=ended - running,
            rows=0,
            new_tokens=0,
            joined=tuple(request.id for request, _ in batch),
            encoded_tokens=sum(len(request.input_ids) for request, _ in batch),
            live_requests=0,
            live_rows=0,
            row_capacity=self.batch_rows,
            waiting_requests=len(self._waiting),
            waiting_tokens=sum(len(request.input_ids) for request, _ in self._waiting.values()),
            queue_seconds=tuple(started - since for _, since in batch),
        )

    def _take_batch(self) -> list[tuple[EncodingRequest, float]]:
        """The longest run of waiting requests that fits, padded to its longest input."""
        batch: list[tuple[EncodingRequest, float]] = []
        longest = 0
        for request, since in self._waiting.values():
            longest = max(longest, len(request.input_ids))
            if batch and (len(batch) == self.batch_rows or longest * (len(batch) + 1) > self.batch_tokens):
                break
            batch.append((request, since))
        for request, _ in batch:
            del self._waiting[request.id]
        return batch
