"""Each manifest by itself: does it render, and is it what Kubernetes takes?"""

from __future__ import annotations

import copy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import BUILDS, KUBERNETES, Manifest, needs_kubectl, only, render


def check(document: Manifest) -> None:
    """Strict: unknown fields are errors; a kind without a schema raises instead of passing with a warning."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("base/*.yaml")), ids=lambda path: path.stem)
def test_each_base_document_is_valid_as_it_stands(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        if document["kind"] != "Kustomization":
            check(document)


@needs_kubectl
@pytest.mark.parametrize("build", BUILDS, ids="+".join)
def test_every_rendered_document_is_valid(build: tuple[str, ...]) -> None:
    documents = render(*build)
    assert {document["kind"] for document in documents} == {
        "Namespace",
        "ServiceAccount",
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
    }
    for document in documents:
        check(document)


@needs_kubectl
def test_the_check_sees_a_typing_error_and_an_unknown_kind() -> None:
    deployment = copy.deepcopy(only(("overlays/cpu",), "Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        check(deployment)
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check({"apiVersion": "example.com/v1", "kind": "Unknown", "metadata": {"name": "x"}})
