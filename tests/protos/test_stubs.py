"""The committed stubs say what the .proto files say."""

from __future__ import annotations

import ast
import importlib
import itertools
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from protos.generate import ROOT, describe, generate

NAMES = sorted(path.stem for path in (ROOT / "protos").glob("*.proto"))


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    out = tmp_path_factory.mktemp("descriptors") / "set.pb"
    describe(out)
    files = FileDescriptorSet.FromString(out.read_bytes()).file
    return {Path(file.name).stem: file for file in files}


@pytest.mark.parametrize("name", NAMES)
def test_committed_descriptors_are_those_of_the_proto_file(name: str, declared: dict[str, FileDescriptorProto]) -> None:
    committed = FileDescriptorProto()
    importlib.import_module(f"protos.{name}_pb2").DESCRIPTOR.CopyToProto(committed)
    assert _without_json_names(committed) == _without_json_names(declared[name])


@pytest.mark.parametrize("name", NAMES)
def test_committed_service_stubs_have_every_method(name: str, declared: dict[str, FileDescriptorProto]) -> None:
    stubs = importlib.import_module(f"protos.{name}_pb2_grpc")
    for service in declared[name].service:
        servicer = getattr(stubs, f"{service.name}Servicer")
        assert {method.name for method in service.method} == {m for m in vars(servicer) if not m.startswith("_")}


@pytest.mark.parametrize("name", NAMES)
def test_committed_types_name_every_field(name: str, declared: dict[str, FileDescriptorProto]) -> None:
    tree = ast.parse((ROOT / "protos" / f"{name}_pb2.pyi").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for message in declared[name].message_type:
        annotated = {ast.unparse(node.target) for node in classes[message.name].body if isinstance(node, ast.AnnAssign)}
        assert {field.name for field in message.field} <= annotated


@pytest.mark.parametrize("name", NAMES)
def test_everything_callers_see_is_commented(name: str) -> None:
    lines = (ROOT / "protos" / f"{name}.proto").read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        declares = line.strip() and not line.strip().startswith(("//", "}", "syntax", "package", "import", "option"))
        assert not declares or above.strip().startswith("//"), f"no comment above {line.strip()!r}"


def test_generation_writes_importable_packages(tmp_path: Path) -> None:
    generate(tmp_path)
    made = sorted(path.name for path in (tmp_path / "protos").iterdir())
    assert made == sorted(f"{name}{end}" for name in NAMES for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"))
    for name in NAMES:
        assert f"from protos import {name}_pb2" in (tmp_path / "protos" / f"{name}_pb2_grpc.py").read_text()


def _without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    """Compilers differ in whether they write these down; they follow from the names."""
    plain = FileDescriptorProto()
    plain.CopyFrom(file)
    for message in plain.message_type:
        for field in message.field:
            field.ClearField("json_name")
    return plain
