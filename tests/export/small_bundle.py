"""The smallest bundle that opens, which its tests spoil."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.bundle import FORMAT_VERSION, Manifest, describe_files, graph_hashes

FILES = {"tokenizer.json": b"{}", "fp32/decode.onnx": b"decode" * 50, "fp32/encode.onnx": b"encode" * 50}
CERTIFICATE: dict[str, Any] = {
    "passed": True,
    "thresholds": {
        "max_logit_difference": 1e-4,
        "identical_tokens": 0.999,
        "metric_loss": 0.1,
        "shortlist_loss": 0.1,
        "max_weight_difference": 0.1,
    },
    "stages": [{"stage": "onnx fp32", "max_logit_difference": 1e-6, "identical_tokens": 1.0}],
    "metric": {"name": "bleu", "loss": 0.0},
    "shortlist": {},
    "alignment": {},
}


def fill(folder: Path) -> Manifest:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    files = describe_files(folder)
    return Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        parameters=12,
        model={"family": "encoder_decoder"},
        task={"name": "tiny"},
        generation={"beams": 1},
        limits={"max_input_tokens": 9},
        precisions=["fp32"],
        provenance={},
        certificate={"fp32": CERTIFICATE | {"graphs": graph_hashes(files, "fp32")}},
        files=files,
    )
