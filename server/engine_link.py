"""One engine process and the socket to it: started, spoken to, and ended from here.

The socket is a file in a directory that only this user can enter; ZeroMQ frames the messages and never blocks the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable
from typing import Self

import zmq

from server.engine_spec import EngineSpec
from server.wire import FromEngine, Start, ToEngine, WireError, decode_from_engine, encode

_log = logging.getLogger(__name__)

_RECONNECT_MS = 20
_AT_ONCE = 256
"""Messages handled before the event loop gets its turn again."""


class EngineLink:
    """A running engine process.

    Args:
        on_message: told of everything the engine says, in order, in the event loop.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.Socket[bytes],
        directory: tempfile.TemporaryDirectory[str],
        on_message: Callable[[FromEngine], None],
    ) -> None:
        self._process, self._socket, self._directory, self._on_message = process, socket, directory, on_message
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._open = True
        self._loop.add_reader(self._descriptor, self._receive)

    @classmethod
    async def start(cls, spec: EngineSpec, on_message: Callable[[FromEngine], None]) -> Self:
        """Spawns the process and tells it what to be; it answers Ready or Unavailable."""
        directory = tempfile.TemporaryDirectory(prefix="transformer-engine-")  # mode 0700
        endpoint = f"ipc://{directory.name}/socket"
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        socket.linger = 0
        socket.sndhwm = 0  # admission bounds what waits; a send must never block this loop
        try:
            socket.reconnect_ivl = _RECONNECT_MS
            socket.connect(endpoint)  # the process binds: a side that connects may send before the other is there
            # A session of its own: Ctrl-C in a terminal reaches the server, which then decides when its engines end.
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "server.engine_process",
                endpoint,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except BaseException:
            socket.close()
            directory.cleanup()
            raise
        link = cls(process, socket, directory, on_message)
        link.send(Start(spec, logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()))
        return link

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Does not wait; what cannot be delivered any more is lost with the process."""
        if self._open:
            self._socket.send(encode(message), zmq.NOBLOCK)
            # The descriptor tells of changes only, and a send may have taken note of one meant for the reader.
            self._loop.call_soon(self._receive)

    async def ended(self) -> int:
        """Waits for the end of the process, and hears out what it said before; its exit code, negative for a signal."""
        code = await self._process.wait()
        await asyncio.sleep(0.01)  # ZeroMQ's own thread brings the last messages
        self._receive()
        return code

    async def kill(self) -> None:
        """Ends the process at once, and waits until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def close(self) -> None:
        """Gives back the socket and its directory."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._descriptor)
            self._socket.close()
            self._directory.cleanup()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _receive(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._open:
                return
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_message(decode_from_engine(data))
            except WireError:
                _log.exception("an engine process said what is no message")
                self._process.kill()
                return
        self._loop.call_soon(self._receive)
