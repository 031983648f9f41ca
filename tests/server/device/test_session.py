"""What a session does with the processor when nobody uses it."""

from __future__ import annotations

import time

import numpy as np

from server.device.session import SessionSettings, open_session, pad
from tests import tiny


def test_threads_rest_as_soon_as_a_run_has_ended() -> None:
    """By the processor time of this process, which other work on the machine does not lengthen; spinning takes some 10 ms."""
    session = open_session(tiny.graphs(tiny.shape("encoder_decoder")) / "encode.onnx", SessionSettings(threads=2))
    source, lengths = pad([range(4, 28)] * 32)
    inputs = {"source": source, "last": lengths - 1, "total": np.array(source.shape[1], np.int32)}
    idle = []
    for _ in range(10):
        session.run(None, inputs)
        began = time.process_time()
        time.sleep(0.02)
        idle.append(time.process_time() - began)
    assert sorted(idle)[5] < 0.002
