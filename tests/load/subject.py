"""Whom the load meets, and what is sent: the user's own model, or one made for the purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from export.bundle import BundleError, open_bundle
from tests.load import inputs


def checked(bundle: Path | None) -> Path | None:
    """Refused here in one line, and not by the first server that is started with it."""
    try:
        if bundle is not None:
            open_bundle(bundle)
    except BundleError as error:
        raise typer.BadParameter(str(error)) from None
    return bundle


GivenBundle = Annotated[
    Path, typer.Argument(help="Directory made by `python -m export`, of a model that generates.", callback=checked)
]
PerhapsBundle = Annotated[
    Path | None,
    typer.Argument(help="Directory made by `python -m export`, of a model that generates; or --shape.", callback=checked),
]


def subject(bundle: Path | None, shape: str | None, inputs_file: Path | None, seed: int) -> tuple[Path, list[str]]:
    """A bundle, and texts for it: the lines of a file, dates, or for a shape texts of its made-up alphabet.

    Args:
        shape: of ``tests.bench.shapes``: a model of random weights whose outputs are all as long as may be.

    Raises:
        typer.BadParameter: unless there is exactly one of bundle and shape.
    """
    if (bundle is None) is (shape is None):
        raise typer.BadParameter("either a BUNDLE or --shape tells what is served")
    if bundle is None:
        assert shape is not None
        from tests.bench.bundles import shape_bundle, shape_texts  # torch is needed for nothing else here

        return shape_bundle(shape), inputs.read_lines(inputs_file) if inputs_file else shape_texts(shape, 1000, seed)
    return bundle, inputs.read_lines(inputs_file) if inputs_file else inputs.dates(1000, seed)
