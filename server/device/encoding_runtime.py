"""The session of a model without a decoder.

Shapes: B rows of a call, C classes, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.device.session import SessionSettings, open_session, pad


class EncodingRuntime:
    """An encoder-only model: class probabilities and vectors."""

    def __init__(self, graphs: Path, settings: SessionSettings, *, classes: int) -> None:
        self._session = open_session(graphs / "encode.onnx", settings)
        self.classes = classes

    def encode(self, sources: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Class probabilities [B, C] (C = 0 without a classification head) and vectors [B, D]."""
        padded, lengths = pad(sources)
        outputs = self._session.run(None, {"source": padded, "last": lengths - 1, "total": np.array(padded.shape[1], np.int32)})
        probabilities = outputs[0] if self.classes else np.zeros((len(sources), 0), np.float32)
        return probabilities, outputs[-1]
