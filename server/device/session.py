"""ONNX Runtime's sessions, and how arrays reach them. The only file that imports onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.bundle import processor_features, session_config

Arrays = dict[str, NDArray[Any]]
Session: TypeAlias = ort.InferenceSession
Binding: TypeAlias = ort.IOBinding


class RuntimeUnavailable(Exception):
    """The device or the model cannot be brought up: one line saying why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    device: str = "cpu"
    """"cpu" or "cuda"."""
    threads: int = 0
    """CPU threads of one session; 0: as many as there are cores."""
    spinning: bool = True
    """Idle threads spin for the next operator: faster steps, at the price of the cores while they wait."""


def choose_device(asked: str) -> str:
    """``auto`` takes CUDA where ONNX Runtime can use it.

    Raises:
        RuntimeUnavailable: when CUDA is asked for and is not there.
    """
    cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if asked == "cuda" and not cuda:
        raise RuntimeUnavailable("--device cuda: this ONNX Runtime has no CUDA provider (install the gpu extra)")
    return "cuda" if cuda and asked in ("auto", "cuda") else "cpu"


def amx_lies_idle() -> bool:
    """Whether eight-bit products of many rows take up to twice as long as this processor could do them in.

    ONNX Runtime (1.32) uses AMX once it has seen what is in its registers survive a move from one processor to another. A
    process that is bound to a single one has no other, and goes without.
    """
    bound = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1
    return bound and any("amx_int8" in features for features in processor_features())


def open_session(path: Path, settings: SessionSettings) -> Session:
    """Raises RuntimeUnavailable when the graph or the device cannot be used."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spinning else "0")
    # Threads of one session that spin on after its run take the cores from the next run, which is often the other session's:
    # beside the decoder's, encoding took one and a half times to three times as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, value in session_config().items():
        options.add_session_config_entry(name, value)
    providers: list[Any] = ["CPUExecutionProvider"]
    # On a CPU the fused operator takes four times as long as the two that it replaces.
    unwanted = ["SkipLayerNormFusion"] if settings.device == "cpu" else []
    if settings.device == "cuda":
        ort.preload_dlls()
        # The arena grows by what is asked, not by doubling: every new shape would otherwise take memory for good.
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": 0, "arena_extend_strategy": "kSameAsRequested"}))
    try:
        session = Session(path, options, providers=providers, disabled_optimizers=unwanted)
    except Exception as error:  # onnxruntime raises a dozen types of its own, none of them public
        raise RuntimeUnavailable(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]})") from None
    if settings.device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeUnavailable("--device cuda: no CUDA device answers (driver, or libraries of another version)")
    return session


def pad(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """[B, S] padded with zeros, and lengths [B]."""
    lengths = np.array([len(s) for s in sequences], np.int32)
    padded = np.zeros((len(sequences), int(lengths.max())), np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded, lengths


def bind_arrays(binding: Binding, inputs: Arrays, outputs: Arrays) -> None:
    """Binds host arrays where they lie; the caller keeps them alive as long as the binding."""
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
