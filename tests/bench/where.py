"""``python -m tests.bench.where REPORT``: where our time goes at the points of ``tests.bench.peers`` that missed their goal.

REPORT is what ``peers --json`` wrote. One engine with the settings that were the fastest at a point does its share of that work
twice: as it is, for what encoding and the engine itself take, and under ONNX Runtime's profiler, for what each kind of operator
of the decode graph takes. The profiler's own time, which it spends between operators, does not count.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast
from unittest import mock

import onnxruntime
import typer

from model.decode import BOS, EOS
from server.batch.engine import Addressed, Engine
from server.batch.kv_cache import Rows
from server.batch.sequence_model import SequenceShape
from server.batch.step_stats import StepStats
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from tests.bench.contender import Job
from tests.bench.operators import profiling
from tests.bench.points import Lengths, Point, Precision, Shape, Strategy
from tests.bench.shapes import build_model, graphs, machine
from tests.bench.sides import answer

_KINDS = {
    "products": {"MatMulIntegerToFloat", "QGemm", "Gemm", "MatMul", "FusedMatMul", "FusedGemm"},
    "attention": {"GroupQueryAttention"},
    "softmax and search": {"LogSoftmax", "ReduceMax", "TopK", "GatherND", "GatherElements"},
}
OTHERS, BETWEEN = "other operators", "between operators"
PARTS = ("the engine itself", "encoding", *_KINDS, OTHERS, BETWEEN)


class TimedRuntime(SequenceRuntime):
    """Knows what its encoding has taken."""

    encoding_seconds = 0.0

    def encode(self, sources: Sequence[Sequence[int]], rows: Sequence[Rows]) -> None:
        began = time.perf_counter()
        super().encode(sources, rows)
        self.encoding_seconds += time.perf_counter() - began


class CountedEngine(Engine):
    """Knows what its steps have taken inside ONNX Runtime."""

    runtime_seconds = 0.0

    def step(self) -> tuple[list[Addressed], StepStats]:
        events, stats = super().step()
        self.runtime_seconds += stats.runtime_seconds
        return events, stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of a job."""

    all: float
    runtime: float
    """Inside ONNX Runtime."""
    encoding: float
    """Of these."""

    def split(self, operators: Mapping[str, float]) -> dict[str, float]:
        """The share of each of PARTS; together 1. Operators: the seconds of each kind in the decode graph."""
        parts = dict.fromkeys(PARTS, 0.0)
        parts["the engine itself"] = self.all - self.runtime
        parts["encoding"] = self.encoding
        for name, seconds in operators.items():
            parts[next((part for part, names in _KINDS.items() if name in names), OTHERS)] += seconds
        inside, decoding = sum(operators.values()), self.runtime - self.encoding
        parts[BETWEEN] = max(0.0, decoding - inside)
        if inside > decoding:  # the machine was slower under the profiler
            for part in (*_KINDS, OTHERS):
                parts[part] *= decoding / inside
        return {part: seconds / self.all for part, seconds in parts.items()}


class Bench:
    """One point's job and the engine that did it fastest."""

    def __init__(self, point: Point, job: Job, threads: int) -> None:
        self._job, model = job, build_model(point.shape)
        self._graphs, self._shape = (
            graphs(point.shape, model, point.precision),
            SequenceShape.from_config(model.config.to_dict()),
        )
        self._settings = SessionSettings(threads=threads, spinning=threads > 1)
        self._step_rows: int | None = None

    def seconds(self) -> Seconds:
        """Of the job, as it is served."""
        runtime = self._open()
        runtime.tune()
        self._step_rows = runtime.step_rows
        return self._run(runtime)

    def operators(self) -> Counter[str]:
        """Seconds of the job, or so, in each kind of operator of the decode graph. Call it after ``seconds``."""
        found: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(onnxruntime, "SessionOptions", profiling(Path(folder) / "profile")):
                runtime = self._open()
            runtime.step_rows = self._step_rows or runtime.rows
            self._run(runtime)
            del runtime
            gc.collect()  # sessions write their files when they go
            largest = max(Path(folder).iterdir(), key=lambda path: path.stat().st_size)
            for event in json.loads(largest.read_text(encoding="utf-8")):
                if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                    found[event["args"]["op_name"]] += event["dur"] / 1e6
        job = self._job
        share = len(job.sources) / (len(job.sources) + job.clients)  # what is profiled is a round of all clients more
        return Counter({name: share * spent for name, spent in found.items()})

    def _open(self) -> TimedRuntime:
        return TimedRuntime(self._graphs, self._shape, self._job.clients * self._job.beams, self._settings)

    def _run(self, runtime: TimedRuntime) -> Seconds:
        job = self._job
        engine = CountedEngine(runtime, start_token=BOS, end_token=EOS, join_tokens=job.tuning["join_tokens"])
        answer(engine, replace(job, sources=job.sources[: job.clients]))  # warm
        runtime.encoding_seconds = engine.runtime_seconds = 0.0
        began = time.perf_counter()
        answer(engine, job)
        return Seconds(all=time.perf_counter() - began, runtime=engine.runtime_seconds, encoding=runtime.encoding_seconds)


def explain(facts: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """The split of one point of a report, by a run of about so many seconds."""
    point = Point(
        shape=Shape(facts["shape"]),
        precision=Precision(facts["precision"]),
        strategy=Strategy(facts["strategy"]),
        concurrency=facts["concurrency"],
        lengths=Lengths(facts["lengths"]),
    )
    config = facts["ours_config"]
    processes, round_of_all = config["processes"], point.job(1)
    words = sum(map(len, round_of_all.sources)) if round_of_all.length is None else point.concurrency * round_of_all.length
    whole = point.job(max(1, round(seconds * facts["ours"] / words)))
    clients = len(range(0, point.concurrency, processes))
    tuning = {name: config[name] for name in ("join_tokens", "running_rows")}
    job = replace(whole, sources=whole.sources[::processes], clients=clients, tuning=tuning)
    bench = Bench(point, job, config["threads"])
    return bench.seconds().split(bench.operators())


def missed(facts: Mapping[str, Any], goal: float, goal_alone: float) -> bool:
    return facts["ratio"] is not None and facts["ratio"] < (goal_alone if facts["concurrency"] == 1 else goal)


def main(
    report: Annotated[Path, typer.Argument(help="Written by `python -m tests.bench.peers --json`.")],
    goal: Annotated[float, typer.Option(help="Ratio to reach.")] = 1.5,
    goal_alone: Annotated[float, typer.Option(help="With one client.")] = 4.0,
    seconds: Annotated[float, typer.Option(help="Length of one run, about.")] = 0.5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here, each point with its split.")] = None,
) -> None:
    told = cast(dict[str, Any], json.loads(report.read_text(encoding="utf-8")))
    print(f"{machine()}; share of our time")
    print(f"| shape, precision, decoding, lengths, clients | ratio | {' | '.join(PARTS)} |")
    print(f"|---|---:|{'---:|' * len(PARTS)}")
    for facts in told["points"]:
        if missed(facts, goal, goal_alone):
            facts["where"] = explain(facts, seconds)
            name = ", ".join(str(facts[field]) for field in ("shape", "precision", "strategy", "lengths", "concurrency"))
            shares = " | ".join(f"{facts['where'][part]:.0%}" for part in PARTS)
            print(f"| {name} | {facts['ratio']:.2f} | {shares} |", flush=True)
            if json_file:
                json_file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
