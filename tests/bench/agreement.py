"""``python -m tests.bench.agreement RUN``: our engine's outputs beside CTranslate2's on the same weights, sentence by sentence.

Every held-out source of the run is decoded by both, in single precision. Each difference is shown with the reference decoder's
scores of both outputs and its explanation:

tie     the scores differ by less than TIE: rounding decides
search  both outputs are found by the reference decoder when its scores are changed by less than TIE: somewhere a hypothesis
        lives or not by rounding
limit   CTranslate2 weighs unfinished hypotheses at the length limit (see ``tests.bench.ctranslate2_peer``)
?       none of these
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from export.graphs import graph_modules
from export.trace import trace
from model import metrics
from model.alignment import alignment_weights, coverage
from model.checkpoint import Run, load_run
from model.decode import BOS, EOS, beam_search, greedy, score
from model.transformer import Transformer
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.requests import Decoding, Finished, GenerationRequest
from tests.bench.ctranslate2_peer import NotConvertible, convert, ids, words
from tests.bench.shapes import machine

TIE = 1e-4
ROUNDINGS = 20
"""How often the reference decoder's scores are changed in search of an explanation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is asked of both sides."""

    beams: int
    max_tokens: int
    length_penalty: float
    coverage_penalty: float


@dataclass(frozen=True, slots=True)
class Output:
    tokens: list[int]
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    sentence: int
    beams: int
    ours: list[int]
    peers: list[int]
    our_score: float
    """The reference decoder's."""
    peers_score: float
    explanation: str


def our_outputs(run: Run, sources: list[list[int]], search: Search, rows: int) -> list[Output]:
    """From the engine that serves, without gRPC."""
    settings = SessionSettings(threads=len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        for name, module in graph_modules(run.model, alignment=True).items():
            trace(module, run.config, Path(folder) / f"{name}.onnx", "fp32")
        runtime = SequenceRuntime(Path(folder), SequenceShape.from_config(run.config.to_dict()), rows, settings)
    engine = Engine(runtime, start_token=BOS, end_token=EOS, align=runtime.align)
    decoding = Decoding(**asdict(search))
    for i, source in enumerate(sources):
        engine.submit(GenerationRequest(id=str(i), input_ids=tuple(source), decoding=decoding))
    found: dict[str, Output] = {}
    while engine.has_work:
        for request_id, event in engine.step()[0]:
            assert isinstance(event, Finished)
            found[request_id] = Output(list(event.hypotheses[0].tokens), event.hypotheses[0].score)
    return [found[str(i)] for i in range(len(sources))]


def peers_outputs(run: Run, sources: list[list[int]], search: Search) -> list[Output]:
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        translator = ctranslate2.Translator(str(convert(run.model, Path(folder))), intra_threads=len(os.sched_getaffinity(0)))
        results = translator.translate_batch(
            [words(source) for source in sources],
            beam_size=search.beams,
            length_penalty=search.length_penalty,
            coverage_penalty=search.coverage_penalty,
            max_decoding_length=search.max_tokens,
            min_decoding_length=0,
            # Beside sources of other lengths, its attention, and so the coverage, is not that of the sentence alone.
            max_batch_size=1 if search.coverage_penalty else 32,
            return_end_token=True,
            return_scores=True,
        )
    return [Output(ids(result.hypotheses[0]), result.scores[0]) for result in results]


def reference_score(run: Run, source: list[int], tokens: list[int], search: Search) -> float:
    found = sum(score(run.model, source, tokens)) / len(tokens) ** search.length_penalty
    if search.coverage_penalty:
        found += search.coverage_penalty * coverage(alignment_weights(run.model, source, tokens))
    return found


def explain(run: Run, source: list[int], ours: Output, peers: Output, search: Search) -> str:
    scores = [reference_score(run, source, output.tokens, search) for output in (ours, peers)]
    if abs(scores[0] - scores[1]) < TIE:
        return "tie"
    if len(peers.tokens) == search.max_tokens and peers.tokens[-1] != EOS:
        return "limit"
    wanted = {tuple(ours.tokens), tuple(peers.tokens)}
    for seed in range(ROUNDINGS):
        if not (wanted := wanted - {reference_output(rounded(run.model, seed), source, search)}):
            return "search"
    return "?"


def reference_output(model: Transformer, source: list[int], search: Search) -> tuple[int, ...]:
    if search.beams == 1:
        return tuple(greedy(model, source, search.max_tokens).tokens)
    return tuple(beam_search(model, source, **asdict(search))[0].tokens)


def rounded(model: Transformer, seed: int) -> Transformer:
    """The model with logits that differ from its own by less than half of TIE."""
    noise = torch.Generator().manual_seed(seed)
    changed = copy.copy(model)

    def logits(states: Tensor) -> Tensor:
        exact = model.logits(states)
        return exact + TIE * (torch.rand(exact.shape, generator=noise) - 0.5)

    changed.logits = logits  # type: ignore[method-assign]
    return changed


def main(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")],
    beams: Annotated[list[int], typer.Option(help="Beam widths to compare; 1 is greedy.")] = [1, 4, 5],  # noqa: B006
    coverage_penalty: Annotated[float, typer.Option(help="Of the beam searches.")] = 0.0,
    limit: Annotated[int, typer.Option(help="Sentences.")] = 1000,
    rows: Annotated[int, typer.Option(help="Of our running batch.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every difference here.")] = None,
) -> None:
    console, run = Console(), load_run(run_folder)
    examples = run.held_out[:limit]
    sources = [run.tokenizer.encode_source(example["source"]) for example in examples]
    targets = [example["target"] for example in examples]
    measure = metrics.TEXT_METRICS[run.task["metric"]]
    table = Table("decoding", "sentences", "differ", "of them", "largest score difference", "ours", "CTranslate2")
    differences: list[Difference] = []
    for width in beams:
        search = Search(
            beams=width,
            max_tokens=min(run.generation["max_tokens"], run.config.max_target_length),
            length_penalty=run.generation["length_penalty"] if width > 1 else 1.0,
            coverage_penalty=coverage_penalty if width > 1 else 0.0,
        )
        try:
            theirs = peers_outputs(run, sources, search)
        except NotConvertible as error:
            raise typer.BadParameter(str(error), param_hint="RUN") from None
        sides = our_outputs(run, sources, search, rows), theirs
        own: list[Difference] = []
        most = 0.0
        for i, (source, ours, peers) in enumerate(zip(sources, *sides, strict=True)):
            if ours.tokens == peers.tokens:
                most = max(most, abs(ours.score - peers.score))
                continue
            our_score, peers_score = (reference_score(run, source, one.tokens, search) for one in (ours, peers))
            own.append(
                Difference(
                    sentence=i,
                    beams=width,
                    ours=ours.tokens,
                    peers=peers.tokens,
                    our_score=our_score,
                    peers_score=peers_score,
                    explanation=explain(run, source, ours, peers, search),
                )
            )
        values = [measure([run.tokenizer.decode(one.tokens) for one in side], targets) for side in sides]
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(d.explanation for d in own).items())
        name = "greedy" if width == 1 else f"beam {width}"
        table.add_row(name, str(len(sources)), str(len(own)), reasons, f"{most:.1e}", *(f"{value:.2f}" for value in values))
        differences += own
    versions = ", ".join(f"{package} {version(package)}" for package in ("onnxruntime", "ctranslate2"))
    console.print(f"{machine()}; {versions}; fp32; {run.task['metric']}; the largest score difference is of equal outputs")
    console.print(table)
    for d in differences:
        console.print(f"{d.sentence}, beam {d.beams}, {d.explanation}: {d.our_score:.6f} {_text(run, d.ours)}", markup=False)
        console.print(f"    CTranslate2: {d.peers_score:.6f} {_text(run, d.peers)}", markup=False)
    if json_file:
        facts: list[dict[str, Any]] = [asdict(difference) for difference in differences]
        json_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _text(run: Run, tokens: list[int]) -> str:
    return run.tokenizer.decode(tokens) + ("" if tokens[-1] == EOS else " …")


if __name__ == "__main__":
    typer.run(main)
