"""A run becomes a bundle: trace, verify, write."""

from __future__ import annotations

import copy
import platform
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch

from export.bundle import (
    FORMAT_VERSION,
    Manifest,
    describe_files,
    graph_hashes,
    write_bundle,
    write_known_answers,
    write_shortlist,
)
from export.graphs import check_exportable, graph_modules
from export.quantize import observe, quantize
from export.shortlist import find_shortlist, shortlist_cost
from export.trace import trace
from export.verify import Certificate, verify
from model.checkpoint import Run, load_run
from model.decode import BOS
from model.transformer import Transformer

PRECISIONS = ("fp32", "fp16", "int8")
"""int8 is for CPUs, fp16 for CUDA devices, fp32 for both."""


class ExportError(Exception):
    """A run that cannot become a bundle: one line saying why."""


def build_bundle(
    run_folder: Path,
    target: Path,
    *,
    name: str,
    precisions: Sequence[str] = ("fp32",),
    shortlist_count: int | None = None,
    alignment: bool = False,
    force: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> list[Certificate]:
    """Exports ``run_folder`` to ``target``; nothing is left there when anything fails.

    Args:
        precisions: of PRECISIONS; each becomes its own set of graphs with its own certificate.
        alignment: with the graph that finds where the decoder looked, for encoder-decoders.
        shortlist_count: leave out of outputs what training targets have less often; None leaves out nothing.

    Returns:
        The certificates, one for each precision.

    Raises:
        ExportError: when the model cannot be exported or its graphs differ from PyTorch by more than allowed.
        model.checkpoint.RunError: for a damaged run, or one whose corpus is gone where a shortlist is asked for.
        export.bundle.BundleError: when ``target`` exists and ``force`` is not set.
    """
    run = load_run(run_folder)
    if problems := check_exportable(run.config):
        raise ExportError(f"{run_folder}: {'; '.join(problems)}")
    if not run.held_out or ("int8" in precisions and not run.calibration):
        raise ExportError(f"{run_folder}: no examples to compare the graphs with (held_out.jsonl, calibration.jsonl)")
    if alignment and run.config.family != "encoder_decoder":
        raise ExportError(f"{run_folder}: only an encoder-decoder has alignments, not a {run.config.family} model")
    certificates: list[Certificate] = []
    shortlist, cost = None, {}
    if shortlist_count is not None:
        shortlist = find_shortlist(run_folder, run, shortlist_count)
        report(f"a shortlist of {len(shortlist)} of {run.config.vocab_size} tokens: measuring what it costs")
        cost = shortlist_cost(run, shortlist)

    def fill(folder: Path) -> Manifest:
        shutil.copyfile(run_folder / "tokenizer.json", folder / "tokenizer.json")
        if shortlist:
            write_shortlist(folder, shortlist)
        for precision in precisions:
            report(f"{precision}: tracing the graphs, comparing them with PyTorch")
            _trace_graphs(run, precision, folder / precision, shortlist, alignment=alignment)
            certificate, known = verify(run, folder / precision, precision, shortlist)
            certificate.shortlist = cost
            if failures := certificate.failures:
                raise ExportError(f"{run_folder}: the {precision} graphs do not do what PyTorch does: {'; '.join(failures)}")
            certificates.append(certificate)
            write_known_answers(folder / precision, known)
        return _manifest(run, name, certificates, folder)

    write_bundle(target, fill, force=force)
    return certificates


def _trace_graphs(run: Run, precision: str, folder: Path, shortlist: Sequence[int] | None, *, alignment: bool) -> None:
    """Writes the graphs of one precision."""
    model = copy.deepcopy(run.model)  # the trained weights stay as they are
    if precision == "fp16":
        model.half()
    if precision == "int8":
        observe(model, partial(_run_examples, model, run.calibration))
    for name, module in graph_modules(model, precision, shortlist, alignment=alignment).items():
        if precision == "int8":
            quantize(module)
        trace(module, run.config, folder / f"{name}.onnx", precision)


def _run_examples(model: Transformer, examples: list[dict[str, list[int]]]) -> None:
    """One forward pass for each, as in training."""
    for example in examples:
        inputs, lengths = torch.tensor([example["input"]]), torch.tensor([len(example["input"])])
        if not model.config.has_decoder:
            model(inputs, lengths)
        elif model.config.has_encoder:
            model(inputs, lengths, torch.tensor([[BOS, *example["output"]]]))
        else:
            model(inputs)


def _manifest(run: Run, name: str, certificates: list[Certificate], folder: Path) -> Manifest:
    config = run.config
    files = describe_files(folder)
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
        certificate={c.precision: c.to_dict() | {"graphs": graph_hashes(files, c.precision)} for c in certificates},
        files=files,
    )
