"""An engine in a process of its own: ``python -m server.engines.engine_process DESCRIPTOR``.

``server.engines.remote_engine`` starts it. It takes commands from a local socket, steps while it has work, and reports
after each, or after several that are shorter than a millisecond and bring only tokens. It never outlives the process that
started it (``server.engines.parent``).
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from export.bundle import BundleError
from server.batch.engine import Addressed
from server.batch.step_stats import StepStats
from server.device.session import RuntimeUnavailable
from server.engines.build_engine import build_engine
from server.engines.message_socket import BlockingSocket
from server.engines.parent import die_with_parent
from server.engines.stepper import Stepper, apply
from server.engines.wire import Commands, Ready, Report, Start, Unavailable, WireError, decode_to_engine, encode
from server.logs import LogLevel, configure_logging
from server.requests import TokensReady

log = logging.getLogger(__name__)

_TOKENS_WAIT_SECONDS = 0.001
"""At most, for those of the steps that follow, where these bring nothing else. To wake the process that takes a report can cost
a quarter of a small model's step, and the message that it makes of it as much as the whole step."""
_TIDY_SECONDS = 60.0
"""Python keeps the memory of tuples that are gone, by the thousand for each length, until a full collection. None comes by
itself where no garbage is made. It takes less than a millisecond, since what was loaded is left out."""


def main(descriptor: int) -> int:
    """The exit code: 0 when asked to end, 1 when it could not be, anything else a fault.

    Args:
        descriptor: of this process's end of the socket.
    """
    # The parent decides when this process ends: a signal to the whole group must not end it before a drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()
    try:
        connection = BlockingSocket(socket.socket(fileno=descriptor))
        (first,) = map(decode_to_engine, connection.receive(wait=True))
        if not isinstance(first, Start):
            raise WireError(f"the first message must be Start, not {type(first).__name__}")
        configure_logging(LogLevel(first.log_level))
        try:
            engine = build_engine(first.spec)
        except (BundleError, RuntimeUnavailable) as error:
            connection.send(encode(Unavailable(str(error))))
            return 1
        gc.freeze()  # what is loaded stays: looking through it all would hold up a step by milliseconds now and then
        connection.send(encode(Ready()))
        run(engine, connection)
    except (EOFError, ConnectionError):
        return 0
    except Exception:
        log.exception("the engine stopped")
        return 70


def run(engine: Stepper, connection: BlockingSocket, clock: Callable[[], float] = time.monotonic) -> NoReturn:
    """Takes commands and steps. Raises EOFError or ConnectionError when the other end is gone."""
    taken, reported, tidied = 0, clock(), clock()
    events, steps = list[Addressed](), list[StepStats]()
    while True:
        received = connection.receive(wait=not engine.has_work)
        taken += len(received)
        for message in map(decode_to_engine, received):
            if not isinstance(message, Commands):
                raise WireError("an engine is started once")
            apply(message.unwrap(), engine)
        may_wait = not received
        if engine.has_work:
            own, stats = engine.step()
            events += own
            steps.append(stats)
            may_wait = may_wait and engine.has_work and _brings_only_tokens(own, stats)
        now = clock()
        if not may_wait or now - reported >= _TOKENS_WAIT_SECONDS:
            connection.send(encode(Report.of(taken, events, steps)))
            events, steps, reported = [], [], now
        if now - tidied >= _TIDY_SECONDS:
            gc.collect()
            tidied = now


def _brings_only_tokens(events: Sequence[Addressed], stats: StepStats) -> bool:
    return not stats.joined and all(isinstance(event, TokensReady) for _, event in events)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit("usage: python -m server.engines.engine_process DESCRIPTOR (started by the server itself)")
    sys.exit(main(int(sys.argv[1])))
