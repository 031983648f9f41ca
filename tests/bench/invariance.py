"""``python -m tests.bench.invariance``: does a result depend on who shares the batch?

Requests of every kind (greedy, beams of several widths, samples; texts of many lengths) are run alone, one after another, then
all at full load, in random order, so that each has random neighbours that come and go. Tokens and scores are compared bit by
bit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.requests import Decoding, Finished, GenerationRequest, Hypothesis, Sampling
from tests.bench.natural import natural_length, source_of
from tests.bench.shapes import SHAPES, build_model, graphs, machine

Results = dict[str, tuple[Hypothesis, ...]]


def random_requests(count: int, vocab_size: int, seed: int) -> list[GenerationRequest]:
    rng = random.Random(seed)

    def decoding() -> Decoding:
        kind = rng.choice(["greedy", "greedy", "beams", "samples"])
        if kind == "beams":
            beams = rng.choice([2, 4, 5, 8])
            return Decoding(max_tokens=48, beams=beams, hypotheses=rng.randint(1, beams))
        if kind == "samples":
            count = rng.randint(1, 3)
            sampling = Sampling(seed=rng.randrange(2**32), temperature=rng.uniform(0.5, 1.2), top_p=rng.choice([0.9, 1.0]))
            return Decoding(max_tokens=48, hypotheses=count, sampling=sampling)
        return Decoding(max_tokens=48)

    return [
        GenerationRequest(id=f"r{i}", input_ids=tuple(source_of(rng, natural_length(rng), vocab_size)), decoding=decoding())
        for i in range(count)
    ]


def run(engine: Engine, requests: Sequence[GenerationRequest]) -> Results:
    for request in requests:
        engine.submit(request)
    results: Results = {}
    while engine.has_work:
        events, _ = engine.step()
        results |= {request_id: event.hypotheses for request_id, event in events if isinstance(event, Finished)}
    return results


def main(
    shapes: Annotated[list[str], typer.Option("--shape", help="base or tiny; may be given twice.")] = ["tiny", "base"],  # noqa: B006
    precisions: Annotated[list[str], typer.Option("--precision")] = ["int8", "fp32"],  # noqa: B006
    count: Annotated[int, typer.Option("--requests")] = 1000,
    rows: Annotated[int, typer.Option(help="Row capacity of the crowded engine.")] = 64,
    threads: Annotated[int, typer.Option(help="Threads of the session.")] = 1,
) -> None:
    console = Console()
    console.print(f"{machine()}; {count:,} requests alone, then in random order in a running batch of {rows} rows")
    table = Table("shape", "precision", "same tokens", "same scores, bit by bit", "largest difference of a log-probability")
    for shape in shapes:
        model, config = build_model(shape), SHAPES[shape]
        requests = random_requests(count, config.vocab_size, seed=1)
        for precision in precisions:
            settings = SessionSettings(threads=threads, spinning=threads > 1)
            runtime = SequenceRuntime(
                graphs(shape, model, precision), SequenceShape.from_config(config.to_dict()), rows, settings
            )
            runtime.tune()
            engine = Engine(runtime, start_token=1, end_token=2)
            alone: Results = {}
            for request in track(requests, f"{shape} {precision}", console=console, transient=True):
                alone |= run(engine, [request])
            crowded = run(engine, random.Random(2).sample(requests, count))
            tokens = scores = 0
            largest = 0.0
            for request in requests:
                first, second = alone[request.id], crowded[request.id]
                if [h.tokens for h in first] == [h.tokens for h in second]:
                    tokens += 1
                    pairs = [(h.log_probabilities, g.log_probabilities) for h, g in zip(first, second, strict=True)]
                    scores += all(a == b for a, b in pairs)
                    largest = max([largest, *(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))])
            table.add_row(shape, precision, f"{tokens:,} of {count:,}", f"{scores:,} of {count:,}", f"{largest:.2g}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
