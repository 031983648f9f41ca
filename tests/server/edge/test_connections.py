"""What one connection may take of the server before anybody has looked at it."""

from __future__ import annotations

import socket
from collections import Counter

from hpack import Encoder
from hyperframe.frame import Frame, RstStreamFrame, SettingsFrame

from protos import transformer_pb2 as pb
from server.config import TransportLimits
from tests.load.fuzz.frames import PREFACE, call_frames
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import run_server, served_model

REFUSED_STREAM = 7
"""RFC 9113, 7: nothing was done for it, and it may be sent again."""


def resets(heard: bytes) -> Counter[int]:
    """By their reason."""
    found, at = Counter[int](), 0
    while len(heard) - at >= 9:
        frame, length = Frame.parse_frame_header(memoryview(heard[at : at + 9]))
        if isinstance(frame, RstStreamFrame) and len(heard) >= at + 9 + length:
            frame.parse_body(memoryview(heard[at + 9 : at + 9 + length]))
            found[frame.error_code] += 1
        at += 9 + length
    return found


async def test_calls_that_were_reset_at_once_keep_their_places_until_the_event_loop_has_seen_them() -> None:
    """CVE-2023-44487: else a few connections fill all places that there are, and others' calls are cancelled.

    No await stands between what is sent and what is heard, so the loop sees nothing.
    """
    most, encoder = TransportLimits().max_streams_per_connection, Encoder()
    frames: list[Frame] = [SettingsFrame(0), SettingsFrame(0, flags=["ACK"])]
    for stream in range(1, 6 * most, 2):
        frames += [call_frames(stream, encoder=encoder)[0], RstStreamFrame(stream, error_code=8)]
    async with run_server(served_model(FakeEngine())) as running:
        with socket.create_connection(("127.0.0.1", running.server.port), timeout=30) as line:
            line.sendall(PREFACE + b"".join(frame.serialize() for frame in frames))
            heard = b""
            while resets(heard)[REFUSED_STREAM] < 2 * most - 1:  # of three times as many; one more than the most are taken
                heard += line.recv(65536)
        await running.stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text="abc")]))


def test_many_connections_leave_places_for_others() -> None:
    limits = TransportLimits()
    assert limits.max_concurrent_calls >= 16 * limits.max_streams_per_connection
