"""A connection on which HTTP/2 is written as one likes, and what the server said on it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Mapping

from hpack import Decoder
from hpack.exceptions import HPACKError
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import Frame, HeadersFrame

from server.call import REQUEST_ID

LISTEN_SECONDS = 0.1
"""How long it is heard what the server says to an abuse."""
_UNKNOWN = "2"
_OWN_FAULTS = frozenset({"13", "14", "15"})
"""INTERNAL, UNAVAILABLE, DATA_LOSS."""


class Line:
    """One TCP connection to the server, and what was sent and heard on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.sent = 0
        """Frames, or writes of what is no frame."""
        self.begun = 0
        """Calls, by frames of headers."""
        self.statuses: Counter[str] = Counter()
        """Of calls, as numbers."""
        self.words: dict[str, str] = {}
        """The message that came last with each."""
        self.faults: list[str] = []
        """Statuses that only a fault of the server explains, and what else must not be."""
        self._heard = bytearray()
        self._decoder = Decoder()

    @classmethod
    async def to(cls, port: int) -> Line:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def write(self, *pieces: bytes | Frame) -> None:
        for piece in pieces:
            with contextlib.suppress(ConnectionError, RuntimeError):
                self._writer.write(piece if isinstance(piece, bytes) else piece.serialize())
                self.sent += 1
                self.begun += isinstance(piece, HeadersFrame)

    async def flush(self) -> None:
        """Waits until it is sent, or the server has hung up, or no longer reads."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(self._writer.drain(), 1.0)

    async def listen(self, seconds: float = LISTEN_SECONDS, *, until_status: bool = False) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(seconds):
                while not (until_status and self.statuses):
                    if not (data := await self._reader.read(65536)):
                        return
                    self._heard += data
                    self._read_frames()

    def hang_up(self, *, rudely: bool = False) -> None:
        """With a FIN, or with a RST that says nothing was read."""
        if rudely and not self._writer.is_closing():
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.close()

    @property
    def closed(self) -> bool:
        """By the server."""
        return self._reader.at_eof()

    def _note(self, status: str, answer: Mapping[str, str]) -> None:
        """What gRPC's core says of frames that it cannot parse may be INTERNAL; whatever comes from this server has an id."""
        self.statuses[status] += 1
        self.words[status] = answer.get("grpc-message", "")
        if status == _UNKNOWN or (status in _OWN_FAULTS and REQUEST_ID in answer):
            self.faults.append(f"status {status}: {self.words[status]}")

    def _read_frames(self) -> None:
        """Header blocks are all decoded, in order, because each depends on those before it."""
        while len(self._heard) >= 9:
            try:
                frame, length = Frame.parse_frame_header(memoryview(bytes(self._heard[:9])))
            except HyperframeError:
                return
            if len(self._heard) < 9 + length:
                return
            body = bytes(self._heard[9 : 9 + length])
            del self._heard[: 9 + length]
            if isinstance(frame, HeadersFrame):
                with contextlib.suppress(HPACKError, HyperframeError):
                    frame.parse_body(memoryview(body))
                    answer = dict(self._decoder.decode(frame.data))
                    if (status := answer.get("grpc-status")) is not None:
                        self._note(status, answer)
