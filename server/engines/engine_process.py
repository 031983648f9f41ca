"""An engine in a process of its own: ``python -m server.engines.engine_process ENDPOINT``.

``server.engines.remote_engine`` starts it. It takes commands from a local socket, steps while it has work, and answers with one
message a step. It never outlives the process that started it (``server.engines.parent``).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import sys

import zmq

from export.bundle import BundleError
from server.device.session import RuntimeUnavailable
from server.engines.build_engine import build_engine
from server.engines.parent import die_with_parent
from server.engines.stepper import Stepper, apply
from server.engines.wire import Commands, FromEngine, Ready, Report, Start, Unavailable, WireError, decode_to_engine, encode
from server.logs import LogLevel, configure_logging

log = logging.getLogger(__name__)

_LAST_WORDS_MS = 2000
"""How long the process waits at its end for the other side to take what it said."""


def main(endpoint: str) -> int:
    """The exit code: 0 when asked to end, 1 when it could not be, anything else a fault."""
    # The parent decides when this process ends: a signal to the whole group must not end it before a drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.linger = _LAST_WORDS_MS
    socket.bind(endpoint)
    try:
        first = decode_to_engine(socket.recv())
        if not isinstance(first, Start):
            raise WireError(f"the first message must be Start, not {type(first).__name__}")
        configure_logging(LogLevel(first.log_level))
        try:
            engine = build_engine(first.spec)
        except (BundleError, RuntimeUnavailable) as error:
            socket.send(encode(Unavailable(str(error))))
            return 1
        gc.freeze()  # what is loaded stays: looking through it all would hold up a step by milliseconds now and then
        socket.send(encode(Ready()))
        run(engine, socket)
    except Exception:
        log.exception("the engine stopped")
        return 70
    finally:
        context.destroy()
    return 0


def run(engine: Stepper, socket: zmq.Socket[bytes]) -> None:
    """Takes commands and steps, until the socket's context ends."""
    taken = 0

    def report(message: FromEngine) -> None:
        socket.send(encode(message))

    while True:
        received = _receive(socket, wait=not engine.has_work)
        taken += len(received)
        for commands in received:
            apply(commands.unwrap(), engine)
        if engine.has_work:
            report(Report.of(taken, *engine.step()))
        else:
            report(Report.of(taken))


def _receive(socket: zmq.Socket[bytes], *, wait: bool) -> list[Commands]:
    """All that has arrived; sleeps until there is something if ``wait``."""
    received: list[Commands] = []
    with contextlib.suppress(zmq.Again):
        while True:
            message = decode_to_engine(socket.recv(0 if wait and not received else zmq.NOBLOCK))
            if not isinstance(message, Commands):
                raise WireError("an engine is started once")
            received.append(message)
    return received


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m server.engines.engine_process ENDPOINT (started by the server itself)")
    sys.exit(main(sys.argv[1]))
