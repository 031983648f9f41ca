"""A short form of ``python -m tests.load.storm``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.load.storm import storm


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder_only"])
async def test_callers_who_leave_leave_nothing_behind(bundles: dict[str, Path], family: str) -> None:
    report = await storm(bundles[family], 400, at_once=16, longest=0.15)
    assert report.after == report.before
    assert (report.after.rows, report.after.waiting) == (0, 0)
    assert report.steps_too_many == 0
    assert report.wasted_tokens > 0
    assert {"CANCELLED", "DEADLINE_EXCEEDED"} <= report.ends.keys()
    assert report.ends.keys() <= {"CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "OK"}
    assert report.ends.total() == 400
