"""The import law: each floor loads what it may and nothing else, as a fresh process shows, and the linter's contracts bite."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("protos", "model", "export", "server")
NETWORK = ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google.protobuf", "google.rpc", "prometheus_client")
TRAINING = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "babel", "sacrebleu", "matplotlib")


def modules_of(package: str) -> list[str]:
    """Every module of a package, from its files; the last first, so that no import cycle hides behind the usual order."""
    files = sorted((ROOT / package).rglob("*.py"), reverse=True)
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def loaded_by(modules: list[str]) -> set[str]:
    """What a fresh process has loaded after importing ``modules``, beside what it begins with."""
    program = (
        "import sys, json, importlib; before = set(sys.modules)\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", program, json.dumps(modules)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def among(loaded: set[str], forbidden: tuple[str, ...]) -> list[str]:
    return sorted(name for name in loaded if any(name == other or name.startswith(f"{other}.") for other in forbidden))


def ours(loaded: set[str]) -> set[str]:
    return {name for name in loaded if name.split(".")[0] in PACKAGES}


def contract(name: str) -> dict:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(c for c in contracts if c["name"] == name)


def sources(name: str) -> list[str]:
    """Every module that a contract is about; it may name packages."""
    named = contract(name)["source_modules"]
    return [module for module in modules_of("server") if module in named or module.rpartition(".")[0] in named]


ENGINE = sources("the engine knows neither the network nor where its model computes")
DECISIONS = sources("decisions are made without a clock or I/O")


def test_protos_loads_nothing_of_ours() -> None:
    loaded = loaded_by(modules_of("protos"))
    assert {name.split(".")[0] for name in ours(loaded)} == {"protos"}


def test_the_tokenizer_is_torch_free() -> None:
    loaded = loaded_by(["model.tokenizer"])
    assert ours(loaded) == {"model", "model.tokenizer"}
    assert among(loaded, (*TRAINING, *NETWORK, "onnxruntime")) == []


def test_model_knows_neither_export_nor_server() -> None:
    loaded = loaded_by(modules_of("model"))
    assert {name.split(".")[0] for name in ours(loaded)} == {"model"}
    assert among(loaded, (*NETWORK, "onnxruntime", "onnxscript")) == []


def test_the_bundle_needs_the_standard_library_alone() -> None:
    loaded = loaded_by(["export.bundle"])
    assert ours(loaded) == {"export", "export.bundle"}
    assert {name.split(".")[0] for name in loaded - ours(loaded)} <= set(sys.stdlib_module_names)


def test_export_knows_no_server() -> None:
    loaded = loaded_by(modules_of("export"))
    assert {name.split(".")[0] for name in ours(loaded)} == {"export", "model"}
    assert among(loaded, ("grpc", "grpc_health", "prometheus_client")) == []  # protobuf is onnx's own


def test_the_server_loads_nothing_that_trains_or_exports() -> None:
    loaded = loaded_by(modules_of("server"))
    assert among(loaded, TRAINING) == []
    assert {name for name in ours(loaded) if not name.startswith(("server", "protos"))} == {
        "export",
        "export.bundle",
        "model",
        "model.tokenizer",
    }


def test_the_engine_loads_neither_runtime_nor_network() -> None:
    loaded = loaded_by(ENGINE)
    assert among(loaded, (*NETWORK, *TRAINING, "onnxruntime", "tokenizers", "protos", "export", "model")) == []


def test_decisions_load_numpy_and_the_standard_library() -> None:
    loaded = loaded_by(DECISIONS)
    foreign = {name.split(".")[0] for name in loaded - ours(loaded)} - set(sys.stdlib_module_names)
    assert {name for name in foreign if not name.startswith("_")} == {"numpy"}
    assert set(DECISIONS) < set(ENGINE)


# The linter


def lint(tree: Path) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def test_the_linters_contracts_are_kept() -> None:
    status, output = lint(ROOT)
    assert status == 0, output


PLANTED = {
    "protos/planted.py": ("import model.tokenizer", ["protos imports nothing of ours"]),
    "model/planted.py": ("import export.bundle", ["model knows neither export nor server"]),
    "model/tokenizer.py": ("import torch", ["the tokenizer needs no torch", "the server never imports what trains or exports"]),
    "export/planted.py": ("import server.batch.beam", ["export knows no server"]),
    "export/bundle.py": ("import numpy", ["the bundle needs the standard library alone"]),
    "server/planted_session.py": ("import onnxruntime", ["only session imports onnxruntime"]),
    "server/planted_metrics.py": ("import prometheus_client", ["only metrics imports prometheus_client"]),
    "server/planted_wire.py": ("import msgspec", ["only the links between our own processes know their schema"]),
    "server/planted_network.py": ("import grpc", ["only the edge touches gRPC and protobuf"]),
    "server/planted_model.py": ("import model.config", ["of ours, the server uses protos, the bundle and the tokenizer"]),
    "server/batch/groups.py": (
        "import server.device.runtime",
        ["the engine knows neither the network nor where its model computes"],
    ),
    "server/batch/beam.py": ("import time", ["decisions are made without a clock or I/O"]),
}


def test_every_contract_bites_in_new_files_too(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, (line, _) in PLANTED.items():
        with (tmp_path / name).open("a") as file:
            file.write(f"\n{line}\n")
    status, output = lint(tmp_path)
    assert status == 1
    broken = set(re.findall(r"^(.+) BROKEN", output, re.MULTILINE))
    assert broken == {name for _, names in PLANTED.values() for name in names}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert broken == {c["name"] for c in contracts}
    for name, (_, (contract_name, *_)) in PLANTED.items():
        module = ".".join(Path(name).with_suffix("").parts)
        assert module in output.split(f"\n{contract_name}\n")[-1], name
