"""``python -m export RUN BUNDLE``: a trained run becomes a bundle that a server can load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from export.build import ExportError, build_bundle
from export.bundle import BundleError
from export.verify import Certificate
from model.checkpoint import RunError


class Precision(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


_FP32_ALONE = [Precision.FP32]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    run: Annotated[Path, typer.Argument(help="Directory that `python -m model train` wrote.")],
    bundle: Annotated[Path, typer.Argument(help="Directory to write.")],
    name: Annotated[str | None, typer.Option(help="Name that callers use for the model (default: the bundle's).")] = None,
    precision: Annotated[
        list[Precision], typer.Option(help="Graphs to make: fp32, int8 for CPUs, fp16 for CUDA; may be given several times.")
    ] = _FP32_ALONE,
    alignment: Annotated[
        bool,
        typer.Option(
            "--alignment",
            help="Add the graph that finds where the decoder looked in the source, for alignments and the coverage penalty.",
        ),
    ] = False,
    shortlist: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="COUNT",
            help="Leave out of outputs every token that the training targets have less often. Faster steps; the certificate"
            " says what it costs. For encoder-decoders; needs the corpus.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
) -> None:
    """Exports a trained run to ONNX, compares every stage with PyTorch, and writes the bundle in one piece."""
    console = Console()
    try:
        certificates = build_bundle(
            run,
            bundle,
            name=name or bundle.name,
            precisions=[p.value for p in dict.fromkeys(precision)],
            shortlist_count=shortlist,
            alignment=alignment,
            force=force,
            report=console.print,
        )
    except (ExportError, BundleError, RunError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for certificate in certificates:
        console.print(certificate_table(certificate))
    console.print(f"{bundle} is ready: python -m server {bundle}")


def certificate_table(certificate: Certificate) -> Table:
    table = Table(title=f"Parity certificate, {certificate.precision}, {certificate.inputs} inputs", title_justify="left")
    for column in ("stage", "against", "largest logit difference", "same best token"):
        table.add_column(column)
    for stage in certificate.stages:
        table.add_row(
            stage["stage"], stage["against"], f"{stage['max_logit_difference']:.1e}", f"{stage['identical_tokens']:.2%}"
        )
    if own := certificate.alignment:
        table.add_row("attention", "pytorch", f"{own['max_weight_difference']:.1e}", f"{own['identical_positions']:.2%}")
    if metric := certificate.metric:
        table.add_row(
            metric["name"], f"{metric['inputs']} inputs", f"pytorch {metric['pytorch']:.2f}", f"onnx {metric['onnx']:.2f}"
        )
    if cost := certificate.shortlist:
        tokens = f"shortlist of {cost['tokens']} of {cost['vocabulary']} tokens: {cost['name']}"
        table.add_row(tokens, f"{cost['inputs']} inputs", f"without {cost['whole']:.2f}", f"with {cost['shortlist']:.2f}")
    return table


if __name__ == "__main__":
    app()
