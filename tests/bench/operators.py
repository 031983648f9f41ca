"""``python -m tests.bench.operators``: where a decode step's time goes, operator by operator, by ONNX Runtime's own profiler.

Rows walk from the first to the last position of a text of the shape's usual length, all together, again and again. The profiler
takes time of its own at every operator, so the step's time without it is shown too; shares are of the operators' time.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import onnxruntime
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from model.transformer import Transformer
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from tests.bench.natural import source_of
from tests.bench.shapes import LENGTHS, SHAPES, build_model, graphs, machine

SECONDS, WARM_UP = 1.0, 0.25
"""Length of a measurement, and the share of its steps, from the first, that does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One decode step; medians in seconds."""

    kinds: dict[str, tuple[float, float]]
    """Operator -> how many there are, and what all of them take."""
    step: float
    """Without the profiler, binding and calling included."""


class Bench:
    """One shape and precision. top_k: candidates for each row's next token; 1 is greedy, a beam search wants two a beam."""

    def __init__(self, shape: str, model: Transformer, precision: str, settings: SessionSettings, top_k: int = 1) -> None:
        self.top_k = top_k
        self.folder, self.settings = graphs(shape, model, precision), settings
        self.shape, self.lengths = SequenceShape.from_config(SHAPES[shape].to_dict()), LENGTHS[shape]

    def profile(self, rows: int) -> Profile:
        step = statistics.median(self._steps(SequenceRuntime(self.folder, self.shape, rows, self.settings), rows))
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(onnxruntime, "SessionOptions", profiling(Path(folder) / "profile")):
                runtime = SequenceRuntime(self.folder, self.shape, rows, self.settings)
            self._steps(runtime, rows)
            del runtime  # its sessions write their files when they go
            gc.collect()
            events = json.loads(max(Path(folder).iterdir(), key=lambda path: path.stat().st_size).read_text(encoding="utf-8"))
        runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])
        runs = runs[round(WARM_UP * len(runs)) :]
        starts = np.array([run["ts"] for run in runs])
        seconds: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(runs)))
        nodes = Counter[str]()
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= starts[0]:
                kind = event["args"]["op_name"]
                seconds[kind][np.searchsorted(starts, event["ts"], "right") - 1] += event["dur"] / 1e6
                nodes[kind] += 1
        kinds = {kind: (nodes[kind] / len(runs), float(np.median(spent))) for kind, spent in seconds.items()}
        return Profile(kinds=dict(sorted(kinds.items(), key=lambda item: -item[1][1])), step=step)

    def _steps(self, runtime: SequenceRuntime, rows: int) -> list[float]:
        """Times of single steps."""
        rng, (source_length, target_length) = random.Random(0), self.lengths
        sources = [source_of(rng, source_length, self.shape.vocab_size) for _ in range(rows)]
        runtime.encode(sources, [np.array([row]) for row in range(rows)])
        tokens, times, end = np.array([source[0] for source in sources]), list[float](), time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            for position in range(target_length):
                started = time.perf_counter()
                runtime.decode(tokens, np.full(rows, position), self.top_k, keep_logits=False)
                times.append(time.perf_counter() - started)
        return times[round(WARM_UP * len(times)) :]


def profiling(prefix: Path) -> type[Any]:
    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling, self.profile_file_prefix = True, str(prefix)

    return Options


def show(console: Console, title: str, profile: Profile) -> None:
    table = Table("operator", "nodes", "ms a step", "share", title=f"{title}: {1e3 * profile.step:.3f} ms a step")
    total = sum(seconds for _, seconds in profile.kinds.values())
    for kind, (nodes, seconds) in profile.kinds.items():
        table.add_row(kind, f"{nodes:.0f}", f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}")
    table.add_row("all", "", f"{1e3 * total:.3f}", "")
    console.print(table)


def main(
    shapes: Annotated[list[str], typer.Option("--shape", help="base or tiny; may be given twice.")] = ["tiny", "base"],  # noqa: B006
    precisions: Annotated[list[str], typer.Option("--precision", help="fp32 or int8.")] = ["fp32"],  # noqa: B006
    rows: Annotated[list[int], typer.Option("--rows", help="Rows at once.")] = [1, 64],  # noqa: B006
    top_k: Annotated[int, typer.Option(help="Candidates for each row's next token: 1 greedy, 8 with four beams.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of the session; 0: all cores.")] = 0,
    spinning: Annotated[bool, typer.Option(help="Let idle threads of the session spin.")] = True,
) -> None:
    console, settings = Console(), SessionSettings(threads=threads, spinning=spinning)
    console.print(f"{machine()}; ONNX Runtime {onnxruntime.__version__}, {threads or 'all'} threads")
    for shape, precision in itertools.product(shapes, precisions):
        bench = Bench(shape, build_model(shape), precision, settings, top_k)
        for count in rows:
            show(console, f"{shape} {precision}, {count} rows", bench.profile(count))


if __name__ == "__main__":
    typer.run(main)
