"""Prometheus series. The engine reports steps, the service reports calls; this file alone knows what becomes of them.

Where several front ends take calls, each counts its own in files (prometheus_client's multi-process mode), and the process that
owns the engines adds them up for whoever asks; what a front end has counted outlives it.

``*_total`` counters of tokens and steps say what the engine did; the histograms of tokens say what callers asked for and got.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from email.message import Message
from functools import partial
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from server.batch.step_stats import StepStats
from server.call import Call
from server.engines.engine_client import EngineClient, EngineStatus, Loss
from server.models import ServedModel

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_QUEUE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKEN_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

prometheus_client.disable_created_metrics()  # a second series for each counter and histogram, which nobody reads


COUNTS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that makes a process count in files of this folder; read once, when prometheus_client is imported."""


class _Series:
    """What both kinds of series have in common: names that begin alike, and a registry of their own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def page(self, headers: Message) -> tuple[str, bytes]:
        """The answer to a scrape, in the format it asks for."""
        encode, content_type = choose_encoder(headers.get("Accept", ""))
        return content_type, encode(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"transformer_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"transformer_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"transformer_{name}", text, labels, buckets=buckets, registry=self.registry)


class CallMetrics(_Series):
    """What a process that takes calls counts."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        _Series.__init__(self, registry or CollectorRegistry())
        self._requests = self._counter("requests", "Calls, by how they ended.", "model", "method", "outcome")
        self._request_seconds = self._histogram(
            "request_duration_seconds", "Time from a call's arrival to its end.", _REQUEST_SECONDS, "model", "method"
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Time from a streaming call's arrival to the first token.", _REQUEST_SECONDS, "model"
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Time between the tokens of a streaming call.", _TOKEN_SECONDS, "model"
        )
        self._given = self._histogram("request_output_tokens", "Tokens of each hypothesis returned.", _TOKENS, "model")

    def add_model(self, model: ServedModel) -> None:
        """Announces a model; its series begin at 0 rather than with the first call."""
        for histogram in (self._first_token, self._inter_token, self._given):
            histogram.labels(model.name)

    def set_ready(self, ready: bool) -> None:
        """Told whether calls are answered."""

    def call_ended(self, call: Call) -> None:
        self._requests.labels(call.model, call.method, call.outcome).inc()
        self._request_seconds.labels(call.model, call.method).observe(call.seconds)

    def inputs_admitted(self, model: str, lengths: Sequence[int]) -> None:
        """Told how many tokens the inputs of a call have that was let in."""

    def outputs_returned(self, model: str, lengths: Sequence[int]) -> None:
        given = self._given.labels(model)
        for length in lengths:
            given.observe(length)

    def stream(self, call: Call) -> StreamTimer:
        """Times the tokens of a streaming call."""
        return StreamTimer(call, self._first_token.labels(call.model), self._inter_token.labels(call.model))


class EngineMetrics(_Series):
    """What the process that owns the engines counts.

    Args:
        counts: folder in which front ends count their calls; None: there are none.
    """

    def __init__(self, version: str, registry: CollectorRegistry | None = None, counts: Path | None = None) -> None:
        _Series.__init__(self, registry or CollectorRegistry())
        if counts is not None:
            MultiProcessCollector(self.registry, str(counts))
        self._asked = self._histogram("request_input_tokens", "Tokens of each input that was let in.", _TOKENS, "model")
        self._queued = self._histogram(
            "queue_duration_seconds", "Time an input waited before it joined the running batch.", _QUEUE_SECONDS, "model"
        )
        self._step = self._histogram("step_duration_seconds", "Time of one engine step.", _TOKEN_SECONDS, "model")
        self._input_tokens = self._counter("input_tokens", "Input tokens the engine encoded or prefilled.", "model")
        self._output_tokens = self._counter("output_tokens", "Output tokens the engine computed, those of every beam.", "model")
        self._wasted_tokens = self._counter(
            "wasted_tokens", "Output tokens computed for requests that were cancelled or whose deadline passed.", "model"
        )
        self._steps = self._counter("steps", "Engine steps.", "model")
        self._step_rows = self._counter("step_rows", "Rows decoded, summed over engine steps.", "model")
        self._step_seconds = self._counter(
            "step_seconds", "Time of engine steps: inside ONNX Runtime, and around it.", "model", "part"
        )
        self._running = self._gauge("requests_running", "Requests that own rows of the running batch.", "model")
        self._waiting = self._gauge("requests_waiting", "Requests waiting to join the running batch.", "model")
        self._tokens_waiting = self._gauge("tokens_waiting", "Input tokens of the waiting requests.", "model")
        self._rows = self._gauge("rows_running", "Rows of the running batch.", "model")
        self._capacity = self._gauge("rows_capacity", "Most rows the running batch can have.", "model")
        self._engines_up = self._gauge("engines_up", "Engines that can answer.", "model")
        self._engine_restarts = self._counter(
            "engine_restarts", "Engine processes that were lost and replaced, by what was wrong with them.", "model", "reason"
        )
        self._progress_age = self._gauge(
            "engine_progress_age_seconds", "Time since the last step of an engine that has work; 0 for an idle one.", "model"
        )
        self._ready = Gauge("transformer_ready", "1 while the server answers calls.", registry=self.registry)
        self._info = self._gauge(
            "model_info", "1 for each loaded model.", "model", "family", "task", "precision", "device", "fingerprint"
        )
        self._front_ends_up = Gauge(
            "transformer_front_ends_up", "Processes that take calls, and serve.", registry=self.registry
        )
        self._front_end_restarts = self._counter(
            "front_end_restarts", "Front ends that were lost and replaced, by what was wrong with them.", "reason"
        )
        for loss in Loss:
            self._front_end_restarts.labels(loss)
        self._gauge("build_info", "1; the label names the release.", "version").labels(version).set(1)

    @property
    def _read_from_status(self) -> dict[Gauge, Callable[[EngineStatus], float]]:
        return {
            self._running: lambda status: status.live_requests,
            self._rows: lambda status: status.live_rows,
            self._capacity: lambda status: status.row_capacity,
            self._waiting: lambda status: status.waiting_requests,
            self._tokens_waiting: lambda status: status.waiting_tokens,
            self._engines_up: lambda status: status.engines_up if status.alive else 0,
            self._progress_age: lambda status: status.progress_age,
        }

    def add_model(self, model: ServedModel) -> None:
        """Announces a model; its series begin at 0 rather than with the first step."""
        facts = (model.family, model.task, model.precision, model.device, model.fingerprint)
        self._info.labels(model.name, *facts).set(1)
        for family in (self._input_tokens, self._output_tokens, self._wasted_tokens, self._steps, self._step_rows):
            family.labels(model.name)
        for loss in Loss:
            self._engine_restarts.labels(model.name, loss)
        for histogram in (self._asked, self._queued, self._step):
            histogram.labels(model.name)
        self._step_seconds.labels(model.name, "runtime")
        self._step_seconds.labels(model.name, "host")
        # Read when asked for: requests come, wait and leave without the engine taking a step.
        for gauge, read in self._read_from_status.items():
            gauge.labels(model.name).set_function(partial(_read, model.engine, read))

    def set_ready(self, ready: bool, front_ends: int | None = None) -> None:
        """Args: front_ends: how many serve; the server itself is the one otherwise."""
        self._ready.set(ready)
        self._front_ends_up.set(ready if front_ends is None else front_ends)

    def inputs_admitted(self, model: str, lengths: Sequence[int]) -> None:
        asked = self._asked.labels(model)
        for length in lengths:
            asked.observe(length)

    def step_done(self, model: str, stats: StepStats) -> None:
        """What one engine step did; safe to call from any thread."""
        self._steps.labels(model).inc()
        self._step_rows.labels(model).inc(stats.rows)
        self._step_seconds.labels(model, "runtime").inc(stats.runtime_seconds)
        self._step_seconds.labels(model, "host").inc(max(0.0, stats.seconds - stats.runtime_seconds))
        self._step.labels(model).observe(stats.seconds)
        self._input_tokens.labels(model).inc(stats.encoded_tokens)
        self._output_tokens.labels(model).inc(stats.new_tokens)
        self._wasted_tokens.labels(model).inc(stats.wasted_tokens)
        for seconds in stats.queue_seconds:
            self._queued.labels(model).observe(seconds)

    def engine_lost(self, model: str, loss: Loss) -> None:
        self._engine_restarts.labels(model, loss).inc()

    def front_end_lost(self, loss: Loss) -> None:
        self._front_end_restarts.labels(loss).inc()


class Metrics(EngineMetrics, CallMetrics):
    """All series of a server that takes its calls itself."""

    def __init__(self, version: str) -> None:
        registry = CollectorRegistry()
        EngineMetrics.__init__(self, version, registry)
        CallMetrics.__init__(self, registry)

    def add_model(self, model: ServedModel) -> None:
        EngineMetrics.add_model(self, model)
        CallMetrics.add_model(self, model)


def _read(engine: EngineClient, read: Callable[[EngineStatus], float]) -> float:
    return read(engine.status)


class StreamTimer:
    """When the tokens of each input of one stream came."""

    def __init__(self, call: Call, first: Histogram, between: Histogram) -> None:
        self._call = call
        self._first = first
        self._between = between
        self._begun: set[int] = set()
        self._latest: dict[tuple[int, int], float] = {}

    def tokens(self, position: int, hypothesis: int, count: int) -> None:
        """``count`` tokens came together; each is given its share of the time since those before them."""
        now = self._call.seconds
        if position not in self._begun:
            self._begun.add(position)
            self._first.observe(now)
        elif (before := self._latest.get((position, hypothesis))) is not None:
            for _ in range(count):
                self._between.observe((now - before) / count)
        self._latest[position, hypothesis] = now
