"""A local ZeroMQ socket in an event loop: messages come in order, and a send never blocks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import zmq

from server.engines.wire import WireError

Message = TypeVar("Message")

_log = logging.getLogger(__name__)

_RECONNECT_MS = 20
_AT_ONCE = 256
"""Messages handled before the event loop gets its turn again."""


class LoopSocket(Generic[Message]):
    """One end of a connection between two processes.

    Args:
        endpoint: a file, as ``ipc://…``.
        bind: this end makes the file; the other one may connect before and after.
        decode: raises WireError for what is no message.
        on_message: told of every message, in the event loop.
        on_nonsense: called once when something else arrives; nothing is read after that.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        bind: bool,
        decode: Callable[[bytes], Message],
        on_message: Callable[[Message], None],
        on_nonsense: Callable[[], None],
    ) -> None:
        self._decode, self._on_message, self._on_nonsense = decode, on_message, on_nonsense
        self._loop = asyncio.get_running_loop()
        self._socket = _open(endpoint, bind)
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._open = True
        self._loop.add_reader(self._descriptor, self.receive)

    def send(self, data: bytes) -> None:
        """Does not wait; what cannot be delivered any more is lost."""
        if self._open:
            self._socket.send(data, zmq.NOBLOCK)
            # The descriptor tells of changes only, and a send may have taken note of one meant for the reader.
            self._loop.call_soon(self.receive)

    def receive(self) -> None:
        """Hands on what has arrived."""
        for _ in range(_AT_ONCE):
            if not self._open:
                return
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_message(self._decode(data))
            except WireError:
                _log.exception("another process said what is no message")
                self._loop.remove_reader(self._descriptor)
                self._on_nonsense()
                return
        self._loop.call_soon(self.receive)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._descriptor)
            self._socket.close()


def _open(endpoint: str, bind: bool) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.linger = 0
    socket.sndhwm = 0  # admission bounds what waits; a send must never block the event loop
    socket.reconnect_ivl = _RECONNECT_MS
    try:
        (socket.bind if bind else socket.connect)(endpoint)
    except BaseException:
        socket.close()
        raise
    return socket
