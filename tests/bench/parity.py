"""``python -m tests.bench.parity RUN BUNDLE``: a run's held-out examples through the service, beside the trained weights.

Every held-out example is sent to a real server of the bundle, many calls at a time, and compared with what PyTorch makes of
the trained weights, one example at a time:

- texts are compared token by token with the reference decoder's; where they differ, the reference's score of both shows
  whether it is a tie;
- classes with the trained classifier's, by label and by probability;
- a language model's log-probabilities of each continuation with the trained model's, token by token.

The task's metric is taken on both sides, by the code of ``python -m model evaluate``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

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

T, R = TypeVar("T"), TypeVar("R")


async def each(items: Sequence[T], call: Callable[[T], Awaitable[R]], concurrency: int) -> list[R]:
    """The results of all calls, at most ``concurrency`` of them under way at a time."""
    gate = asyncio.Semaphore(concurrency)

    async def one(item: T) -> R:
        async with gate:
            return await call(item)

    return await asyncio.gather(*map(one, items))


async def translate(
    client: TransformerClient, sources: list[str], beams: int, max_tokens: int, concurrency: int
) -> list[Generation]:
    options = Options(beams=beams, max_tokens=max_tokens)

    async def one(source: str) -> Generation:
        return (await client.generate([source], options, return_tokens=True))[0]

    return await each(sources, one, concurrency)


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


def compare_translations(run: Run, target: str, beams: int, limit: int, concurrency: int, console: Console) -> dict[str, str]:
    examples = run.held_out[:limit]
    sources, targets = [e["source"] for e in examples], [e["target"] for e in examples]
    max_tokens = min(run.generation["max_tokens"], run.config.max_target_length)
    measure = metrics.TEXT_METRICS[run.task["metric"]]

    async def ask() -> list[Generation]:
        async with TransformerClient(target, timeout=120) as client:
            return await translate(client, sources, beams, max_tokens, concurrency)

    started = time.perf_counter()
    found = asyncio.run(ask())
    seconds = time.perf_counter() - started
    wanted = [reference(run, s, beams, max_tokens) for s in track(sources, f"reference, beam {beams}", console=console)]
    differ = ties = 0
    for source, generation, tokens in zip(sources, found, wanted, strict=True):
        served_tokens = [token.id for token in generation.hypotheses[0].tokens]
        if served_tokens != tokens:
            differ += 1
            ties += abs(penalised(run, source, served_tokens) - penalised(run, source, tokens)) < TIE
    texts = [run.tokenizer.decode([t for t in tokens if t != Tokenizer.EOS]) for tokens in wanted]
    return {
        "decoding": "greedy" if beams == 1 else f"beam {beams}",
        "sentences": str(len(sources)),
        "differ": str(differ),
        "of them ties": str(ties),
        f"{run.task['metric']} served": f"{measure([g.text for g in found], targets):.2f}",
        "reference": f"{measure(texts, targets):.2f}",
        "served sentences/s": f"{len(sources) / seconds:.1f}",
    }


async def served_classes(client: TransformerClient, texts: list[str], concurrency: int) -> list[dict[str, float]]:
    """The probability of each label."""

    async def one(text: str) -> dict[str, float]:
        (result,) = await client.classify([text])
        return {entry.label: entry.probability for entry in result.classes}

    return await each(texts, one, concurrency)


@torch.no_grad()
def trained_classes(run: Run, text: str) -> dict[str, float]:
    ids = run.tokenizer.encode_source(text)
    logits = run.model.classify(torch.tensor([ids]), torch.tensor([len(ids)])).logits
    assert logits is not None
    return dict(zip(run.task["labels"], logits[0].softmax(-1).tolist(), strict=True))


def compare_classes(run: Run, target: str, limit: int, concurrency: int) -> dict[str, str]:
    texts, labels = [e["source"] for e in run.held_out[:limit]], [e["label"] for e in run.held_out[:limit]]

    async def ask() -> list[dict[str, float]]:
        async with TransformerClient(target, timeout=120) as client:
            return await served_classes(client, texts, concurrency)

    found, wanted = asyncio.run(ask()), [trained_classes(run, text) for text in texts]
    likeliest = [[max(p, key=p.__getitem__) for p in side] for side in (found, wanted)]
    accuracies = [metrics.classification(side, labels, run.task["labels"])["accuracy"] for side in likeliest]
    apart = max(abs(f[label] - w[label]) for f, w in zip(found, wanted, strict=True) for label in w)
    return {
        "texts": str(len(texts)),
        "differ": str(sum(f != w for f, w in zip(*likeliest, strict=True))),
        "accuracy served": f"{accuracies[0]:.2f}",
        "trained": f"{accuracies[1]:.2f}",
        "largest difference of a probability": f"{apart:.1e}",
    }


async def served_log_probabilities(
    client: TransformerClient, pairs: list[tuple[list[int], list[int]]], concurrency: int
) -> list[list[float]]:
    """Of every token of each continuation, given its prompt."""

    async def one(pair: tuple[list[int], list[int]]) -> list[float]:
        (result,) = await client.score([pair], return_tokens=True)
        return [token.log_probability for token in result.tokens]

    return await each(pairs, one, concurrency)


def compare_continuations(run: Run, target: str, limit: int, concurrency: int) -> dict[str, str]:
    pairs = []
    for example in run.held_out[:limit]:
        prompt = run.tokenizer.encode_text(example["source"])
        pairs.append((prompt, run.tokenizer.encode_text(example["target"])[: run.config.max_target_length - len(prompt)]))

    async def ask() -> list[list[float]]:
        async with TransformerClient(target, timeout=120) as client:
            return await served_log_probabilities(client, pairs, concurrency)

    found, wanted = asyncio.run(ask()), [score(run.model, prompt, continuation) for prompt, continuation in pairs]
    nats = [-sum(map(sum, side)) / sum(map(len, side)) for side in (found, wanted)]
    apart = max(abs(f - w) for fs, ws in zip(found, wanted, strict=True) for f, w in zip(fs, ws, strict=True))
    return {
        "continuations": str(len(pairs)),
        "tokens": str(sum(map(len, found))),
        "nats a token served": f"{nats[0]:.5f}",
        "trained": f"{nats[1]:.5f}",
        "largest difference of a log-probability": f"{apart:.1e}",
    }


def main(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")],
    bundle: Annotated[Path, typer.Argument()],
    beams: Annotated[list[int], typer.Option(help="Beam widths to compare; 1 is greedy. Translation only.")] = [1, 5],  # noqa: B006
    precision: Annotated[str, typer.Option(help="Which graphs the server runs.")] = "fp32",
    limit: Annotated[int, typer.Option(help="Held-out examples.")] = 2000,
    concurrency: Annotated[int, typer.Option(help="Calls in flight.")] = 32,
) -> None:
    console = Console()
    run = load_run(run_folder)
    rows = []
    for width in beams if run.task["kind"] == "sequence_to_sequence" else [1]:
        with served(bundle, "--precision", precision) as target:
            if run.task["kind"] == "sequence_to_sequence":
                rows.append(compare_translations(run, target, width, limit, concurrency, console))
            elif run.task["kind"] == "classification":
                rows.append(compare_classes(run, target, limit, concurrency))
            else:
                rows.append(compare_continuations(run, target, limit, concurrency))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(f"{concurrency} calls in flight; server {precision}; PyTorch {torch.__version__}, fp32")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
