"""Train, evaluate and describe Transformers from the command line.

python -m model train dates --out runs/dates
"""

from __future__ import annotations

import os

# Read when torch is loaded: waiting threads sleep. Spinning, they slow each other down many times over on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from model.config import PRESETS, ConfigError, ModelConfig
from model.data import DataError
from model.recipe import RecipeError, load_recipe, shipped_recipes
from model.tokenizer import TokenizerError

if TYPE_CHECKING:
    from model.significance import Comparison

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a setting of the recipe; may be repeated.")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help=f"A shipped recipe ({', '.join(shipped_recipes())}) or a TOML file.")],
    out: Annotated[Path, typer.Option(help="The run's directory, made by this command.")],
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Go on exactly where the run in --out was left.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write scalars into OUT/tensorboard as well.")] = False,
) -> None:
    """Train a recipe into a run directory, and write its report.

    On several devices or processes: torchrun --nproc-per-node N -m model train ...; training.accumulate is shared out;
    with --set training.parallel=sharded each process holds a share of the model.
    """
    from model.report import write_report
    from model.train import train as train_recipe

    if resume and force:
        raise typer.BadParameter("--resume and --force exclude each other")
    train_recipe(load_recipe(recipe, overrides), out, resume=resume, force=force, tensorboard=tensorboard)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"report: {write_report(out)}", err=True)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    source: Annotated[Path | None, typer.Option(help="Text to evaluate on (default: the run's held-out examples).")] = None,
    target: Annotated[Path | None, typer.Option(help="The other side of parallel text.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="1: greedy, in batches; more: the reference beam search, slow.")] = 1,
    against: Annotated[
        Path | None, typer.Option(help="Another run of the same task: compare by paired bootstrap over the examples.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a trained run by its task's metrics, or two runs against each other."""
    from model.checkpoint import load_run
    from model.evaluate import compare_runs, evaluate_run

    console = Console(stderr=True)
    with console.status("evaluating") as status:

        def tell(done: int, everything: int) -> None:
            status.update(f"{done:,} of {everything:,}")

        ours = load_run(run)
        if against:
            comparisons = compare_runs(ours, load_run(against), source=source, target=target, beams=beams, on_progress=tell)
        else:
            metrics = evaluate_run(ours, source=source, target=target, beams=beams, on_progress=tell)
    if against:
        _show_comparisons(comparisons, str(run), str(against), as_json)
        return
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def _show_comparisons(comparisons: list[Comparison], run: str, other: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({c.metric: asdict(c) | {"difference": c.difference} for c in comparisons}))
        return
    table = Table("metric", run, other, "difference", "95 % interval", "p")
    for c in comparisons:
        interval = f"{c.low:+.2f} … {c.high:+.2f}"
        table.add_row(c.metric, f"{c.ours:.2f}", f"{c.theirs:.2f}", f"{c.difference:+.2f}", interval, f"{c.p:.3f}")
    Console().print(table)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory, finished or still training.")]) -> None:
    """Draw a run's curves, samples and cross-attention on one page, report.html."""
    from model.report import write_report

    typer.echo(write_report(run))


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help=f"A preset ({', '.join(PRESETS)}), a shipped recipe, a TOML file or a run.")],
    vocab_size: Annotated[
        int | None, typer.Option(min=5, help="The vocabulary of a recipe that only finds it in its training data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count parameters by part, without allocating weights."""
    from model.describe import count_parameters

    config = _configuration(name, vocab_size)
    parts = count_parameters(config)
    matrices, vectors = sum(p.matrices for p in parts), sum(p.vectors for p in parts)
    if as_json:
        by_part = {p.part: {"matrices": p.matrices, "vectors": p.vectors} for p in parts}
        typer.echo(json.dumps({"model": config.to_dict(), "parts": by_part, "matrices": matrices, "vectors": vectors}))
        return
    table = Table("part", title=f"{name}: {config.family}, vocabulary {config.vocab_size:,}", show_footer=True)
    table.columns[0].footer = "all"
    table.add_column("matrices", justify="right", footer=f"{matrices:,}")
    table.add_column("biases, norms, positions", justify="right", footer=f"{vectors:,}")
    for part in parts:
        table.add_row(part.part, f"{part.matrices:,}", f"{part.vectors:,}")
    Console().print(table)


def _configuration(name: str, vocab_size: int | None) -> ModelConfig:
    """Of a run, else a preset, else a recipe."""
    from model.checkpoint import read_record

    if (Path(name) / "run.json").exists():
        return ModelConfig.from_dict(read_record(Path(name))["model"])
    if name in PRESETS:
        return PRESETS[name]
    if name not in shipped_recipes() and not Path(name).is_file():
        known = ", ".join([*PRESETS, *shipped_recipes()])
        raise RecipeError([f"{name!r} is no run, recipe file or one of {known}"])
    recipe = load_recipe(name)
    vocab_size = vocab_size or recipe.tokenizer.vocab_size
    if not vocab_size and recipe.data.generator:
        from model.prepare import prepare

        vocab_size = prepare(recipe).tokenizer.vocab_size
    if not vocab_size:
        typer.echo(
            f"{name} takes its vocabulary from its corpus: counted with 1 id, --vocab-size sets another number", err=True
        )
    return recipe.model_config(vocab_size or 1)


def main() -> None:
    from model.checkpoint import RunError
    from model.train import TrainingError

    try:
        app()
    except (RecipeError, ConfigError) as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
    except (DataError, TokenizerError, RunError, TrainingError) as error:
        typer.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        typer.echo("interrupted; --resume goes on from the last evaluation", err=True)
        sys.exit(130)
    sys.exit(2)


if __name__ == "__main__":
    main()
