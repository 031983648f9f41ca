"""A server with several front ends: they take the calls, on one port; this process owns the engines and the queue.

So there is one queue, one order of tenants and one forecast, whoever took the call, and one place that counts.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from server.config import Device, EngineOptions, ServerOptions
from server.engines.kept_process import Supervision
from server.front_ends.front_end import FrontEnd, FrontEndUnavailable
from server.front_ends.front_wire import Begin
from server.lifecycle import CannotServe, Lifecycle, done_before, open_pages, wait_for
from server.metrics import COUNTS_FOLDER, EngineMetrics
from server.models import Models, ServedModel
from server.waiting.waiting_room import WaitingRoom

_log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.25
"""How often engines and front ends are looked at, and front ends are told how the engines stand."""
_LAST_ANSWERS_SECONDS = 3.0
"""For a front end to end after its drain."""


class Supervisor(Lifecycle):
    """Serves models through ``options.front_ends`` processes. Starts nothing until ``startup``.

    Args:
        bundles: the models' directories, in the same order.
        engine: what the models were loaded with.
        counts: the folder where front ends count, which ``metrics`` reads.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        bundles: Sequence[Path],
        options: ServerOptions,
        engine: EngineOptions,
        metrics: EngineMetrics,
        counts: Path,
        log_level: str = "info",
    ) -> None:
        super().__init__()
        self.port = options.port
        """Of gRPC; the real one after ``startup``."""
        self.http_port = options.http_port
        self._options, self._metrics, self._counts, self._log_level = options, metrics, counts, log_level
        # The device is settled: a front end has none to look for.
        self._engine = replace(engine, device=Device(models[0].device))
        self._bundles = tuple((str(path.absolute()), model.fingerprint) for path, model in zip(bundles, models, strict=True))
        self._rooms = [
            WaitingRoom(model.engine, options.admission, partial(metrics.inputs_admitted, model.name)) for model in models
        ]
        self._models = Models(replace(model, engine=room) for model, room in zip(models, self._rooms, strict=True))
        self._front_ends: list[FrontEnd] = []
        self._resources = ExitStack()
        self._serving = False

    @property
    def serving(self) -> bool:
        """Every engine can answer, and some front end takes calls."""
        return self._serving

    @property
    def front_ends(self) -> Sequence[FrontEnd]:
        return self._front_ends

    async def startup(self) -> None:
        """Front ends answer probes at once, and calls once every engine is warm.

        Raises:
            CannotServe: when a port is taken, or a front end cannot begin.
        """
        self._reserve_port()
        pages = open_pages(self._options, {"/metrics": self._metrics.page})
        self._resources.callback(pages.close)
        self.http_port = pages.port
        for model in self._models:
            self._metrics.add_model(model)
        self._front_ends = [self._make_front_end(number) for number in range(1, self._options.front_ends + 1)]
        _log.info("warming up", extra={"port": self.port, "http_port": self.http_port})
        starting = [*(one.start() for one in self._front_ends), *(room.start() for room in self._rooms)]
        warm = asyncio.gather(*starting)
        try:
            if await done_before(self._stop, warm):
                warm.result()
            else:
                warm.cancel()
        except FrontEndUnavailable as error:
            raise CannotServe(str(error)) from None

    async def main_loop(self) -> None:
        """Tells front ends how the engines stand, until asked to stop."""
        while not self._stop.is_set():
            statuses = [room.status for room in self._rooms]
            for front_end in self._front_ends:
                front_end.tell(statuses)
            ready = sum(front_end.serving for front_end in self._front_ends)
            # The first time all must be there; later the others go on when one is being replaced.
            enough = ready > 0 if self._serving else ready == len(self._front_ends)
            self._set_serving(enough and all(status.alive for status in statuses), ready)
            await wait_for(self._stop, _WATCH_SECONDS)

    async def shutdown(self) -> None:
        """Front ends turn NOT_SERVING and finish their calls; when they are gone, the engines end."""
        self._set_serving(False, 0)
        seconds = self._options.notice_seconds + self._options.drain_seconds + _LAST_ANSWERS_SECONDS
        ending = asyncio.gather(*(front_end.stop(seconds) for front_end in self._front_ends), return_exceptions=True)
        if not await done_before(self._force, ending):
            for front_end in self._front_ends:
                front_end.hurry()
            await asyncio.wait([ending], timeout=_LAST_ANSWERS_SECONDS)
        if not ending.done():
            ending.cancel()
            await asyncio.gather(*(front_end.stop(0) for front_end in self._front_ends), return_exceptions=True)
        for error in await asyncio.gather(*(room.drain(0) for room in self._rooms), return_exceptions=True):
            if error is not None:
                _log.error("an engine could not be drained", exc_info=error)
        await asyncio.to_thread(self._resources.close)
        _log.info("stopped")

    def _make_front_end(self, number: int) -> FrontEnd:
        begin = Begin(number, self._bundles, self._engine, replace(self._options, port=self.port), self._log_level)
        environment = {COUNTS_FOLDER: str(self._counts)}
        supervision = Supervision(stall_seconds=self._engine.stall_seconds)
        return FrontEnd(begin, self._rooms, environment, self._metrics.front_end_lost, supervision)

    def _reserve_port(self) -> None:
        """Keeps the port from strangers while front ends come and go; only a socket that listens gets connections.

        Raises:
            CannotServe: when somebody has it already.
        """
        options = self._options
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        try:
            address = socket.getaddrinfo(options.host, options.port, family, socket.SOCK_STREAM)[0][4]
            with socket.socket(family, socket.SOCK_STREAM) as alone:  # refused beside anybody who listens, sharing or not
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(address)
                self.port = alone.getsockname()[1]
            shared = self._resources.enter_context(socket.socket(family, socket.SOCK_STREAM))
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shared.bind((address[0], self.port, *address[2:]))
        except OSError:
            raise CannotServe(f"cannot listen on {options.address(options.port)}") from None

    def _set_serving(self, serving: bool, front_ends: int) -> None:
        if serving is not self._serving:
            self._serving = serving
            _log.log(logging.INFO if serving else logging.WARNING, "serving" if serving else "not serving")
        self._metrics.set_ready(serving, front_ends)
