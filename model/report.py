"""A run on one page: report.html with its pictures inside, to open, to mail, to keep."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from model.alignment import cross_attention_weights
from model.checkpoint import Run, RunError, load_run
from model.decode import greedy_batch
from model.evaluate import classify, translate
from model.files import write_text
from model.plots import draw_attention, draw_curves
from model.tokenizer import Tokenizer
from model.train_log import read_log

SAMPLES = 8
_LONGEST_ALIGNED = 32
"""Tokens of a sentence whose attention still makes a readable picture."""


def write_report(directory: Path) -> Path:
    """Draws the curves and samples of the run in ``directory`` and writes report.html and plots/ beside it.

    Works for a run that is still training as well, once it has been evaluated.

    Raises:
        RunError: for a run that cannot be read, or whose log is empty.
    """
    run, entries = load_run(directory), read_log(directory / "log.jsonl")
    if not any("loss" in entry for entry in entries):
        raise RunError(f"{directory / 'log.jsonl'}: no update in it: nothing to report")
    plots = directory / "plots"
    pictures = draw_curves(entries, run.task["metric"], plots)
    samples = _samples(run)
    if run.task["kind"] == "sequence_to_sequence":
        pictures["cross-attention"] = _draw_alignment(run, plots / "attention.png")
    recipe = directory / "recipe.toml"
    page = _page(run, entries, pictures, samples, recipe.read_text(encoding="utf-8") if recipe.exists() else "")
    write_text(directory / "report.html", page)
    return directory / "report.html"


def _samples(run: Run) -> list[tuple[str, str, str]]:
    """Held-out examples as (input, the model's output, what was wanted)."""
    examples = run.held_out[:SAMPLES]
    sources = [example["source"] for example in examples]
    kind = run.task["kind"]
    if kind == "classification":
        return [(e["source"], classify(run, [e["source"]])[0], e["label"]) for e in examples]
    translated = kind == "sequence_to_sequence"
    outputs = translate(run, sources) if translated else [_continuation(run, source) for source in sources]
    return [(e["source"], output, e["target"]) for e, output in zip(examples, outputs, strict=True)]


def _continuation(run: Run, text: str) -> str:
    prompt = run.tokenizer.encode_text(text)
    room = min(run.generation["max_tokens"], run.config.max_target_length - len(prompt))
    return run.tokenizer.decode(greedy_batch(run.model, [prompt], room)[0])


def _draw_alignment(run: Run, picture: Path) -> Path:
    """Of the first held-out sentence that is neither trivial nor too long for a picture, translated by the model."""
    encoded = [run.tokenizer.encode_source(example["source"]) for example in run.held_out]
    source = next((ids for ids in encoded if 8 <= len(ids) <= _LONGEST_ALIGNED), encoded[0][:_LONGEST_ALIGNED])
    limit = min(run.generation["max_tokens"], run.config.max_target_length, _LONGEST_ALIGNED)
    output = greedy_batch(run.model, [source], limit)[0]
    weights = cross_attention_weights(run.model, source, [Tokenizer.BOS, *output])  # [L, H, T, S]
    # Row t is what was looked at to write token t; the heads of a layer share the work.
    return draw_attention(weights[-1].mean(0), _tokens(run, source), _tokens(run, [*output, Tokenizer.EOS]), picture)


def _tokens(run: Run, ids: Sequence[int]) -> list[str]:
    """Each token as it looks in a text; special ones by name."""
    texts = [run.tokenizer.decode([i]).strip() for i in ids]
    return [text or piece for text, piece in zip(texts, run.tokenizer.pieces(ids), strict=True)]


def _page(
    run: Run, entries: Sequence[dict[str, Any]], pictures: dict[str, Path], samples: list[tuple[str, str, str]], recipe: str
) -> str:
    figures = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in _figures(run, entries)
    )
    plots = "".join(_picture(name, path) for name, path in pictures.items() if name != "cross-attention")
    attention = ""
    if "cross-attention" in pictures:
        attention = (
            "<h2>Where the decoder looked</h2><p>One held-out sentence and the model's own greedy output: the last decoder "
            "layer's cross-attention, mean over heads. A row says where the model looked to write that token.</p>"
            f"{_picture('cross-attention', pictures['cross-attention'], 'wide')}"
        )
    rows = "".join(
        f"<tr><td>{escape(source)}</td><td>{escape(output)}</td><td>{escape(wanted)}</td></tr>"
        for source, output, wanted in samples
    )
    name = escape(run.task["name"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p>{escape(_sentence(run))}</p>
<div class="tiles">{figures}</div>
<h2>Curves</h2>
<div class="plots">{plots}</div>
<h2>Samples</h2>
<p>Held-out examples; greedy output.</p>
<table><tr><th>input</th><th>output</th><th>wanted</th></tr>{rows}</table>
{attention}
<h2>Recipe</h2>
<details><summary>Every setting of this run</summary><pre>{escape(recipe)}</pre></details>
</body>
</html>
"""


def _figures(run: Run, entries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The tiles: name and value."""
    facts, last = run.provenance, entries[-1]
    figures = [(name.replace("_", " ") + " (held-out)", f"{value:.2f}") for name, value in facts["metrics"].items()]
    figures += [
        ("best validation loss", f"{facts['validation_loss']:.4f}"),
        ("updates", f"{last['update']:,}"),
        ("epochs", f"{last['epoch']:,}"),
        ("labels learnt from", f"{facts['tokens']:,}"),
        ("labels a second", f"{facts['tokens_per_second']:,.0f}"),
        ("training time", _duration(last["seconds"])),
        ("parameters", f"{sum(p.numel() for p in run.model.parameters()):,}"),
        ("seed", str(facts["seed"])),
    ]
    return figures


def _sentence(run: Run) -> str:
    facts = run.provenance
    processes = f", {facts['processes']} processes" if facts.get("processes", 1) > 1 else ""
    stopped = f"Stopped: {facts['stopped']}." if facts.get("stopped") else "No reason for stopping: training, or interrupted."
    return (
        f"Started {facts['started']} on {facts['machine']}{processes}, {facts['precision']}, PyTorch {facts['torch']}. "
        f"{stopped} Samples and attention come from {facts['weights']}."
    )


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {round(seconds) % 60:02} s"


def _picture(name: str, path: Path, kind: str = "plot") -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img class="{kind}" alt="{escape(name)}" src="data:image/png;base64,{content}">'


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 2rem auto;
       padding: 0 1rem }
h1 { margin: 0 } h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem } p { color: #555; margin: .3rem 0 1rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: .6rem }
.tile { border: 1px solid #e3e5e9; border-radius: 8px; padding: .6rem .8rem }
.tile b { display: block; font-size: 1.25rem } .tile span { color: #666; font-size: .85rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem }
img { max-width: 100% } img.plot { width: 100% }
table { border-collapse: collapse; width: 100%; font-size: .95rem } th { text-align: left; color: #666 }
th, td { padding: .4rem .6rem; border-bottom: 1px solid #e3e5e9; vertical-align: top; width: 33% }
pre { background: #f6f7f9; padding: 1rem; border-radius: 8px; overflow: auto; font-size: .85rem }
"""
