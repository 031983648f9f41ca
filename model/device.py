"""What the machine offers: the device, the precision it is fast in, and how it handles memory."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from pathlib import Path
from typing import Literal

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises RuntimeError if CUDA is asked for and not there."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device cuda was asked for, but PyTorch finds no CUDA device here")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(choice: Literal["auto", "fp32", "bf16"], device: torch.device) -> str:
    """A key of PRECISIONS. ``auto`` on a CPU measures, for a few milliseconds: only some processors multiply bf16."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if 1.3 * _product_seconds(torch.bfloat16) < _product_seconds(torch.float32) else "fp32"


def _product_seconds(dtype: torch.dtype) -> float:
    """The best of a few products of the size that training multiplies."""
    a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def keep_freed_memory() -> None:
    """Asks glibc not to hand large blocks back to the kernel after every use, only to fetch and clear them again.

    Activations are megabytes each, allocated and freed at every layer; on CPUs this makes training about a fifth faster.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library: nothing to tune
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def describe_machine(device: torch.device) -> str:
    """One line for a run's record."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return f"{name}, {cores} CPU cores"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
