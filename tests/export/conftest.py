"""What tests of the export share."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.bundle import write_bundle
from tests.export.small_bundle import fill


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A bundle of its own for each test."""
    write_bundle(tmp_path / "bundle", fill)
    return tmp_path / "bundle"
