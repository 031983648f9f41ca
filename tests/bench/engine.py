"""``python -m tests.bench.engine``: tokens/s of the served decode loop beside PyTorch, in one run.

Both sides generate texts of fixed length from sources of fixed length, greedily, encoding included, all rows at once. The
engine is the one that serves (scheduling, choosing, bookkeeping and all); PyTorch is the model's own incremental decoding,
batched over the same rows.
"""

from __future__ import annotations

import os

# Read when torch is loaded: between its turns PyTorch's threads must sleep, or they take the cores from the other side.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time
from typing import Annotated

import onnxruntime
import torch
import typer
from rich.console import Console
from rich.table import Table

from model.transformer import Transformer
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.requests import Decoding, GenerationRequest
from tests.bench.shapes import LENGTHS, SHAPES, build_model, graphs, machine

BOS, EOS = 1, 2


def engine_run(engine: Engine, sources: list[list[int]], length: int) -> tuple[float, float]:
    """Seconds in all, and of them the share spent outside ONNX Runtime."""
    for i, source in enumerate(sources):
        decoding = Decoding(max_tokens=length, min_tokens=length)
        engine.submit(GenerationRequest(id=f"r{i}", input_ids=tuple(source), decoding=decoding))
    started, inside = time.perf_counter(), 0.0
    while engine.has_work:
        _, stats = engine.step()
        inside += stats.runtime_seconds
    seconds = time.perf_counter() - started
    return seconds, 1 - inside / seconds


@torch.inference_mode()
def torch_run(model: Transformer, sources: list[list[int]], length: int) -> float:
    started = time.perf_counter()
    source = torch.tensor(sources)
    memory, cache = model.memory(source, torch.full((len(sources),), source.size(1))), None
    tokens = torch.full((len(sources), 1), BOS)
    for _ in range(length):
        states, cache = model.decode(tokens, memory, cache)
        logits = model.logits(states[:, -1])
        logits[:, EOS] = -torch.inf
        tokens = logits.argmax(-1, keepdim=True)
    return time.perf_counter() - started


def main(
    shapes: Annotated[list[str], typer.Option("--shape", help="base or tiny; may be given twice.")] = ["tiny", "base"],  # noqa: B006
    rows: Annotated[list[int], typer.Option("--rows", help="Rows at once; may be given several times.")] = [1, 8, 32, 64],  # noqa: B006
    repeat: Annotated[int, typer.Option(help="Runs of each side, taken in turn; medians are shown.")] = 5,
    precision: Annotated[str, typer.Option(help="fp32 or int8 graphs of the engine; PyTorch computes in fp32.")] = "fp32",
    threads: Annotated[int, typer.Option(help="Threads of the engine's session; 0: all cores.")] = 0,
    spinning: Annotated[bool, typer.Option(help="Let idle threads of the engine's session spin.")] = True,
) -> None:
    console = Console()
    console.print(
        f"{machine()}; ONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}; {precision}, greedy, fixed lengths"
    )
    for shape in shapes:
        model = build_model(shape)
        source_length, target_length = LENGTHS[shape]
        settings = SessionSettings(threads=threads, spinning=spinning)
        runtime = SequenceRuntime(
            graphs(shape, model, precision), SequenceShape.from_config(SHAPES[shape].to_dict()), max(rows), settings
        )
        table = Table("rows", "engine tokens/s", "PyTorch tokens/s", "ratio", "engine's own share", title=f"{shape}")
        for count in rows:
            sources = torch.randint(4, SHAPES[shape].vocab_size, (count, source_length)).tolist()
            engine = Engine(runtime, start_token=BOS, end_token=EOS, join_tokens=count * source_length)
            engine_run(engine, sources, target_length)
            torch_run(model, sources, target_length)
            pairs = [
                (engine_run(engine, sources, target_length), torch_run(model, sources, target_length)) for _ in range(repeat)
            ]
            tokens = count * target_length
            table.add_row(
                str(count),
                f"{tokens / statistics.median(e for (e, _), _ in pairs):,.0f}",
                f"{tokens / statistics.median(t for _, t in pairs):,.0f}",
                f"{statistics.median(t / e for (e, _), t in pairs):.2f}",
                f"{statistics.median(share for (_, share), _ in pairs):.0%}",
            )
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
