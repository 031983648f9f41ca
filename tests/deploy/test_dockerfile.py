"""The image, as far as it can be judged without building it."""

from __future__ import annotations

import json
import tomllib

import pytest

from server.config import ServerOptions
from tests.deploy.dockerfile import lineage, parse
from tests.deploy.manifests import ROOT

STAGES = parse(ROOT / "deploy" / "Dockerfile")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = ["cpu", "gpu", "cpu-with-bundle", "gpu-with-bundle"]
TRAINING = ("torch", "onnx", "onnxscript", "safetensors", "transformers", "train", "export", "dev", "bench")
BUILT_LATER = {"bundles/dates"}


def copied_from_context() -> set[str]:
    found: set[str] = set()
    for stage in STAGES.values():
        for arguments in stage.all("COPY"):
            *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
            if "--from=" not in arguments:
                found.update(sources)
    return found


def test_every_target_exists_and_a_plain_build_makes_the_cpu_image() -> None:
    assert {*TARGETS, "bundle"} <= STAGES.keys()
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_the_runtime_is_built_on_the_plain_base_and_takes_only_the_environment(target: str) -> None:
    stages = lineage(STAGES, target)
    assert stages[-1].base.startswith("python:3.11-slim")
    copies = [arguments for stage in stages for arguments in stage.all("COPY")]
    accelerator = target.removesuffix("-with-bundle")
    expected = [f"--from=build-{accelerator} /opt/venv /opt/venv"]
    if target.endswith("-with-bundle"):
        expected.append("--from=bundle --chown=65532:65532 / /bundles/model")
    assert sorted(copies) == sorted(expected)
    assert not any("pip" in arguments or "apt" in arguments for stage in stages for arguments in stage.all("RUN"))


@pytest.mark.parametrize("target", TARGETS)
def test_the_runtime_user_has_no_rights(target: str) -> None:
    users = [arguments for stage in reversed(lineage(STAGES, target)) for arguments in stage.all("USER")]
    assert users[-1] == "65532:65532"


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_starts_the_server_on_its_ports(target: str) -> None:
    (entry,) = [json.loads(arguments) for stage in lineage(STAGES, target) for arguments in stage.all("ENTRYPOINT")]
    (command,) = [json.loads(arguments) for stage in lineage(STAGES, target) for arguments in stage.all("CMD")]
    assert entry == ["python", "-m", "server"]
    assert command == ["/bundles/model", "--host", "0.0.0.0"]
    (ports,) = [arguments.split() for stage in lineage(STAGES, target) for arguments in stage.all("EXPOSE")]
    assert ports == [str(ServerOptions().port), str(ServerOptions().http_port)]


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_what_is_installed_trains_nothing(accelerator: str) -> None:
    installs = [arguments for arguments in STAGES[f"build-{accelerator}"].all("RUN") if " install " in arguments]
    assert [arguments.rpartition(" install ")[2] for arguments in installs] == [
        f'".[{accelerator}]"',
        "--no-deps --force-reinstall .",
    ]
    required = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][accelerator]]
    names = {requirement.split(";")[0].split("[")[0].rstrip("<>=!~.0123456789 ") for requirement in required}
    assert not names & set(TRAINING)


def test_the_gpu_extra_brings_the_libraries_of_cuda() -> None:
    (runtime,) = [text for text in PROJECT["optional-dependencies"]["gpu"] if text.startswith("onnxruntime-gpu")]
    assert "cuda" in runtime and "cudnn" in runtime, "the image takes only the driver from the node"


def test_every_file_that_is_copied_exists_and_reaches_the_builder() -> None:
    let_through = {
        line.removeprefix("!").strip()
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    for source in copied_from_context():
        assert source.split("/")[0] in let_through, f"{source} is kept from the builder by .dockerignore"
        assert source in BUILT_LATER or (ROOT / source).exists(), f"{source} does not exist"


def test_everything_that_the_build_needs_is_copied() -> None:
    packages = {
        pattern.rstrip("*")
        for pattern in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"][
            "find"
        ]["include"]
    }
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], *packages} <= copied_from_context()
