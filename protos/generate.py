"""Makes the committed stubs from the .proto files beside this one: ``python -m protos.generate``."""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
"""Proto files are named from here, so that the generated modules import each other as ``protos.…``."""


class ProtocError(RuntimeError):
    """The compiler refused a proto file; it has said why on standard error."""


def generate(out: Path) -> None:
    """Writes ``protos/*_pb2.py``, ``*_pb2.pyi`` and ``*_pb2_grpc.py`` below ``out``."""
    _compile(f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}")


def describe(out: Path) -> None:
    """Writes what the proto files declare, as a serialised ``google.protobuf.FileDescriptorSet``, to the file ``out``."""
    _compile(f"--descriptor_set_out={out}")


def _compile(*outputs: str) -> None:
    files = sorted(str(path) for path in (ROOT / "protos").glob("*.proto"))
    if protoc.main(["protoc", f"--proto_path={ROOT}", *outputs, *files]) != 0:
        raise ProtocError("protoc failed")


if __name__ == "__main__":
    try:
        generate(ROOT)
    except ProtocError as error:
        sys.exit(f"error: {error}")
