"""What holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# One thread for each process: tests run tiny models, and on a busy machine threads that wait for each other cost far more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline for an example: whether the machine is busy is not what is tested. Every run tries the same examples.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of a tiny model with random weights, for each family; the run it came from lies beside it."""
    from tests import tiny  # here, because most tests need no torch

    root = tmp_path_factory.mktemp("bundles")
    return {family: tiny.write_bundle(root / family, family) for family in tiny.SHAPES}
