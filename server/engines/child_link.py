"""A process of our own and the socket to it: started, spoken to, and ended from here.

The socket is a file in a directory that only this user can enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Generic, Self

from server.engines.loop_socket import LoopSocket, Message


class ChildLink(Generic[Message]):
    """A running ``python -m MODULE ENDPOINT``, which ends with this process (``server.engines.parent``)."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        directory: tempfile.TemporaryDirectory[str],
        endpoint: str,
        decode: Callable[[bytes], Message],
        on_message: Callable[[Message], None],
    ) -> None:
        self._process, self._directory = process, directory
        # The process binds: a side that connects may send before the other is there.
        self._socket = LoopSocket(endpoint, bind=False, decode=decode, on_message=on_message, on_nonsense=self._kill)

    @classmethod
    async def start(
        cls,
        module: str,
        decode: Callable[[bytes], Message],
        on_message: Callable[[Message], None],
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Spawns the process.

        Args:
            on_message: told of everything the process says, in order, in the event loop.
            environment: added to this process's own.
        """
        kind = module.rpartition(".")[2].removesuffix("_process").replace("_", "-")
        directory = tempfile.TemporaryDirectory(prefix=f"transformer-{kind}-")  # mode 0700
        endpoint = f"ipc://{directory.name}/socket"
        try:
            # A session of its own: Ctrl-C in a terminal reaches the server, which then decides when its processes end.
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                endpoint,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        except BaseException:
            directory.cleanup()
            raise
        return cls(process, directory, endpoint, decode, on_message)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, data: bytes) -> None:
        """Does not wait; what cannot be delivered any more is lost with the process."""
        self._socket.send(data)

    async def ended(self) -> int:
        """Waits for the end of the process, and hears out what it said before; its exit code, negative for a signal."""
        code = await self._process.wait()
        await asyncio.sleep(0.01)  # ZeroMQ's own thread brings the last messages
        self._socket.receive()
        return code

    def terminate(self) -> None:
        """Asks the process to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def kill(self) -> None:
        """Ends the process at once, and waits until it is gone."""
        self._kill()
        await self._process.wait()

    def close(self) -> None:
        """Gives back the socket and its directory."""
        self._socket.close()
        self._directory.cleanup()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
