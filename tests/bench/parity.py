"""``python -m tests.bench.parity RUN BUNDLE``: a test set through the service, token by token against the reference decoder.

Every held-out source of the run is sent to a real server of the bundle, many calls at a time; the tokens that come back are
compared with what the reference decoder makes of the trained weights, one sentence at a time in PyTorch. Where they differ, the
reference's score of both outputs shows whether it is a tie.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from model import metrics
from model.checkpoint import Run, load_run
from model.decode import beam_search, greedy, score
from model.tokenizer import Tokenizer
from server.client import Generation, Options, TransformerClient
from tests.bench.served import served

TIE = 1e-4
"""Outputs whose scores differ by less are equally good, as far as fp32 can tell."""


async def translate(target: str, sources: list[str], beams: int, max_tokens: int, concurrency: int) -> list[Generation]:
    gate = asyncio.Semaphore(concurrency)
    options = Options(beams=beams, max_tokens=max_tokens)
    async with TransformerClient(target, timeout=120) as client:

        async def one(source: str) -> Generation:
            async with gate:
                return (await client.generate([source], options, return_tokens=True))[0]

        return await asyncio.gather(*(one(source) for source in sources))


def reference(run: Run, source: str, beams: int, max_tokens: int) -> list[int]:
    ids = run.tokenizer.encode_source(source)
    if beams == 1:
        return greedy(run.model, ids, max_tokens).tokens
    return beam_search(run.model, ids, beams=beams, max_tokens=max_tokens, length_penalty=run.generation["length_penalty"])[
        0
    ].tokens


def penalised(run: Run, source: str, tokens: list[int]) -> float:
    total = sum(score(run.model, run.tokenizer.encode_source(source), tokens))
    return total / len(tokens) ** run.generation["length_penalty"]


def main(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")],
    bundle: Annotated[Path, typer.Argument()],
    beams: Annotated[list[int], typer.Option(help="Beam widths to compare; 1 is greedy.")] = [1, 5],  # noqa: B006
    precision: Annotated[str, typer.Option(help="Which graphs the server runs.")] = "fp32",
    limit: Annotated[int, typer.Option(help="Sentences.")] = 1000,
    concurrency: Annotated[int, typer.Option(help="Calls in flight.")] = 32,
) -> None:
    console = Console()
    run = load_run(run_folder)
    examples = run.held_out[:limit]
    sources, targets = [e["source"] for e in examples], [e["target"] for e in examples]
    max_tokens = min(run.generation["max_tokens"], run.config.max_target_length)
    measure = metrics.TEXT_METRICS[run.task["metric"]]
    table = Table(
        "decoding", "sentences", "differ", "of them ties", f"{run.task['metric']} served", "reference", "served sentences/s"
    )
    for width in beams:
        with served(bundle, "--precision", precision) as target:
            started = time.perf_counter()
            found = asyncio.run(translate(target, sources, width, max_tokens, concurrency))
            seconds = time.perf_counter() - started
        wanted = [reference(run, s, width, max_tokens) for s in track(sources, f"reference, beam {width}", console=console)]
        differ = ties = 0
        for source, generation, tokens in zip(sources, found, wanted, strict=True):
            served_tokens = [token.id for token in generation.hypotheses[0].tokens]
            if served_tokens != tokens:
                differ += 1
                ties += abs(penalised(run, source, served_tokens) - penalised(run, source, tokens)) < TIE
        texts = [run.tokenizer.decode([t for t in tokens if t != Tokenizer.EOS]) for tokens in wanted]
        table.add_row(
            "greedy" if width == 1 else f"beam {width}",
            str(len(sources)),
            str(differ),
            str(ties),
            f"{measure([g.text for g in found], targets):.2f}",
            f"{measure(texts, targets):.2f}",
            f"{len(sources) / seconds:.1f}",
        )
    console.print(f"{concurrency} calls in flight; server {precision}; PyTorch {torch.__version__}, fp32")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
