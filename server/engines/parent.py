"""A process that must not outlive the one that started it: the kernel sees to it, and where it cannot, the end of standard
input does."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Call first. The parent holds the other end of this process's standard input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A parent that ended before the line above has closed the pipe; one on another system will.
    threading.Thread(target=_end_with_stdin, name="parent", daemon=True).start()


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)
