"""A process of our own and the socket to it: started, spoken to, and ended from here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Generic, Self

from server.engines.message_socket import LoopSocket, Message

_LAST_WORDS_SECONDS = 1.0
"""A process that has ended is heard out for no longer, should another one hold its end of the socket."""


class ChildLink(Generic[Message]):
    """A running ``python -m MODULE DESCRIPTOR``, which ends with this process (``server.engines.parent``)."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        decode: Callable[[bytes], Message],
        on_message: Callable[[Message], None],
    ) -> None:
        self._process = process
        self._socket = LoopSocket(decode, on_message, on_nonsense=self._kill)

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
        ours, its = socket.socketpair()
        with its:
            try:
                # A session of its own: Ctrl-C in a terminal reaches the server, which then decides when its processes end.
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    module,
                    str(its.fileno()),
                    stdin=asyncio.subprocess.PIPE,
                    pass_fds=[its.fileno()],
                    start_new_session=True,
                    env={**os.environ, **(environment or {})},
                )
            except BaseException:
                ours.close()
                raise
        link = cls(process, decode, on_message)
        try:
            await link._socket.open(ours)
        except BaseException:
            link._kill()
            ours.close()
            raise
        return link

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, data: bytes) -> None:
        """Does not wait; what cannot be delivered any more is lost with the process."""
        self._socket.send(data)

    async def ended(self) -> int:
        """Waits for the end of the process, and hears out what it said before; its exit code, negative for a signal."""
        code = await self._process.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._socket.ended), _LAST_WORDS_SECONDS)
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
        """Gives back the socket."""
        self._socket.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
