"""A run becomes a bundle: trace, verify, write."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnxruntime

from export.bundle import FORMAT_VERSION, Manifest, describe_files, write_bundle
from export.graphs import check_exportable, graph_modules
from export.trace import trace
from export.verify import Certificate, verify
from model.checkpoint import Run, load_run


class ExportError(Exception):
    """A run that cannot become a bundle: one line saying why."""


def build_bundle(
    run_folder: Path, target: Path, *, name: str, force: bool = False, report: Callable[[str], None] = lambda _: None
) -> Certificate:
    """Exports ``run_folder`` to ``target``; nothing is left there when anything fails.

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
        report(f"tracing the graphs of {run.config.family}")
        for graph, module in graph_modules(run.model).items():
            trace(module, run.config, folder / "fp32" / f"{graph}.onnx")
        shutil.copyfile(run_folder / "tokenizer.json", folder / "tokenizer.json")
        report("comparing them with PyTorch")
        certificates.append(verify(run, folder / "fp32", "fp32"))
        if failures := certificates[-1].failures:
            raise ExportError(f"{run_folder}: the graphs do not do what PyTorch does: {'; '.join(failures)}")
        return _manifest(run, name, certificates[-1], folder)

    write_bundle(target, fill, force=force)
    return certificates[-1]


def _manifest(run: Run, name: str, certificate: Certificate, folder: Path) -> Manifest:
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
        precisions=["fp32"],
        provenance=run.provenance
        | {"export": versions | {"onnxruntime": onnxruntime.__version__, "machine": platform.machine()}},
        certificate=certificate.to_dict(),
        files=describe_files(folder),
    )
