"""A run becomes a bundle: trace, verify, write."""

from __future__ import annotations

import copy
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch

from export.bundle import FORMAT_VERSION, Manifest, describe_files, write_bundle
from export.graphs import check_exportable, graph_modules
from export.trace import trace
from export.verify import Certificate, verify
from model.checkpoint import Run, load_run

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class ExportError(Exception):
    """A run that cannot become a bundle: one line saying why."""


def build_bundle(
    run_folder: Path,
    target: Path,
    *,
    name: str,
    precisions: Sequence[str] = ("fp32",),
    force: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> list[Certificate]:
    """Exports ``run_folder`` to ``target``; nothing is left there when anything fails.

    Args:
        precisions: "fp32", "fp16"; each becomes its own set of graphs with its own certificate.

    Returns:
        The certificates, one for each precision.

    Raises:
        ExportError: when the model cannot be exported or its graphs differ from PyTorch by more than allowed.
        model.checkpoint.RunError: for a damaged run.
        export.bundle.BundleError: when ``target`` exists and ``force`` is not set.
    """
    run = load_run(run_folder)
    if problems := check_exportable(run.config):
        raise ExportError(f"{run_folder}: {'; '.join(problems)}")
    certificates: list[Certificate] = []

    def fill(folder: Path) -> Manifest:
        shutil.copyfile(run_folder / "tokenizer.json", folder / "tokenizer.json")
        for precision in precisions:
            report(f"{precision}: tracing the graphs, comparing them with PyTorch")
            dtype = DTYPES[precision]
            # A copy: half precision would be the trained model's own otherwise.
            for graph, module in graph_modules(copy.deepcopy(run.model).to(dtype)).items():
                trace(module, run.config, folder / precision / f"{graph}.onnx", dtype)
            certificates.append(verify(run, folder / precision, precision))
            if failures := certificates[-1].failures:
                raise ExportError(f"{run_folder}: the {precision} graphs do not do what PyTorch does: {'; '.join(failures)}")
        return _manifest(run, name, certificates, folder)

    write_bundle(target, fill, force=force)
    return certificates


def _manifest(run: Run, name: str, certificates: list[Certificate], folder: Path) -> Manifest:
    config = run.config
    versions = {package: version(package) for package in ("torch", "onnx", "onnxscript")}
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        parameters=sum(p.numel() for p in run.model.parameters()),
        model=config.to_dict(),
        task=run.task,
        generation=run.generation,
        limits={
            "max_input_tokens": config.max_source_length if config.has_encoder else config.max_target_length - 1,
            "max_output_tokens": config.max_target_length,
        },
        precisions=[certificate.precision for certificate in certificates],
        provenance=run.provenance
        | {"export": versions | {"onnxruntime": onnxruntime.__version__, "machine": platform.machine()}},
        certificate={certificate.precision: certificate.to_dict() for certificate in certificates},
        files=describe_files(folder),
    )
