"""A short form of ``python -m tests.load.replicas``."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.load.replicas import torment


async def test_replicas_come_and_go_and_no_call_is_lost(bundles: dict[str, Path]) -> None:
    arguments = ("--device", "cpu", "--engines", "1", "--threads", "1", "--max-rows", "8")
    endings = [signal.SIGKILL, signal.SIGTERM]
    report = await torment(bundles["encoder_decoder"], endings, calls=200, replicas=2, callers=6, arguments=arguments)
    assert dict(report.lost) == {}
    assert report.wrong == 0
    assert report.calls >= 200
    assert report.ended == {"SIGKILL": 1, "SIGTERM": 1}
