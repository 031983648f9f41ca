"""The Kubernetes manifests as the API server would get them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("overlays/cpu", "overlays/gpu")
COMPONENTS = ("components/bundle-image", "components/bundle-in-image")
BUILDS = [("base",), *((overlay,) for overlay in OVERLAYS), *((o, c) for o in OVERLAYS for c in COMPONENTS)]
"""A directory to render, and a component on top of it."""

Manifest = dict[str, Any]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders kustomize, is not installed")


@functools.cache
def render(*build: str) -> tuple[Manifest, ...]:
    """Every document of a build, by ``kubectl kustomize``."""
    if len(build) == 1:
        return _kustomize(KUBERNETES / build[0])
    overlay, component = (os.path.relpath(KUBERNETES / part, tempfile.gettempdir()) for part in build)
    with tempfile.TemporaryDirectory() as folder:
        content = {"resources": [f"../{overlay}"], "components": [f"../{component}"]}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        return _kustomize(Path(folder))


def only(build: tuple[str, ...], kind: str) -> Manifest:
    """The one document of this kind."""
    (found,) = [document for document in render(*build) if document["kind"] == kind]
    return found


def container(build: tuple[str, ...]) -> Manifest:
    (found,) = only(build, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def flags(build: tuple[str, ...]) -> dict[str, str]:
    """The server's flags and their values."""
    pairs = (argument.removeprefix("--").partition("=") for argument in container(build)["args"] if argument.startswith("--"))
    return {name: value for name, _, value in pairs}


def _kustomize(folder: Path) -> tuple[Manifest, ...]:
    ran = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr, f"kustomize warns: {ran.stderr}"
    return tuple(yaml.safe_load_all(ran.stdout))
