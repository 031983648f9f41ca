from __future__ import annotations

from pathlib import Path

import pytest

from export.build import build_bundle
from tests import tiny


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of a tiny model with random weights, for each family."""
    root = tmp_path_factory.mktemp("bundles")
    for family, config in tiny.SHAPES.items():
        build_bundle(tiny.write_run(root / f"{family}.run", config), root / family, name=family)
    return {family: root / family for family in tiny.SHAPES}
