"""The server in one process: gRPC, health and metrics around models. Also what each of several front ends runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import transformer_pb2_grpc
from server.config import ServerOptions
from server.edge.health import Health
from server.edge.interceptors import Guard
from server.edge.service import NAME, TransformerService
from server.http import PagesServer
from server.lifecycle import CannotServe, Lifecycle, done_before, open_pages, wait_for
from server.metrics import CallMetrics
from server.models import Models, ServedModel
from server.waiting.room import Room
from server.waiting.waiting_room import WaitingRoom

_log = logging.getLogger(__name__)

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_WATCH_SECONDS = 0.25
"""How often the engines are looked at; a dead one turns health within this time."""
_LAST_ANSWERS_SECONDS = 1.0
"""For handlers to send what the drained engines gave them."""


class Server(Lifecycle):
    """Serves models over gRPC and their metrics over HTTP. Starts nothing until ``startup``.

    Args:
        rooms: where requests wait, by model, when another process keeps them. This one is then a front end: it shares its port
            with others and has no pages. None: this process keeps them.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        options: ServerOptions,
        metrics: CallMetrics,
        rooms: Mapping[str, Room] | None = None,
    ) -> None:
        super().__init__()
        self.port = options.port
        """Of gRPC; the real one after ``startup``."""
        self.http_port = options.http_port
        self._options = options
        self._is_front_end = rooms is not None
        self._rooms = rooms or {
            model.name: WaitingRoom(model.engine, options.admission, partial(metrics.inputs_admitted, model.name))
            for model in models
        }
        self._models = Models(replace(model, engine=self._rooms[model.name]) for model in models)
        self._metrics = metrics
        self._pages: PagesServer | None = None
        self._health = Health("", NAME)
        self._service = TransformerService(
            self._models, self._rooms, metrics, write_timeout_seconds=options.write_timeout_seconds
        )
        self._grpc: grpc.aio.Server | None = None

    @property
    def models(self) -> Models:
        """With their queues in front of their engines."""
        return self._models

    @property
    def serving(self) -> bool:
        """What health says."""
        return self._health.serving

    async def startup(self) -> None:
        """Answers probes at once, and calls once every engine is warm.

        Raises:
            CannotServe: when a port is taken, or protobuf would run in pure Python.
        """
        if (backend := api_implementation.Type()) != "upb":  # pure Python has no bound on nesting, and is slow
            raise CannotServe(f"protobuf must run on its upb backend, not {backend!r}")
        self._grpc = self._bind()
        await self._grpc.start()
        if not self._is_front_end:
            self._pages = open_pages(self._options, {"/metrics": self._metrics.page})
            self.http_port = self._pages.port
        for model in self._models:
            self._metrics.add_model(model)
        pages = {"http_port": self.http_port} if self._pages else {}
        _log.info("warming up", extra={"port": self.port, **pages})
        warm = asyncio.gather(*(model.engine.start() for model in self._models))
        if await done_before(self._stop, warm):
            warm.result()
            self._service.open = True
            self._set_serving(True)
        else:
            warm.cancel()

    async def main_loop(self) -> None:
        """Keeps health true to the engines until asked to stop."""
        while not self._stop.is_set():
            alive = all(model.engine.status.alive for model in self._models)
            if alive is not self._health.serving:
                self._set_serving(alive)
            await wait_for(self._stop, _WATCH_SECONDS)

    async def shutdown(self) -> None:
        """NOT_SERVING first; then calls in flight are finished within the drain time; then the ports close."""
        self._set_serving(False)
        if self._grpc is not None:
            await wait_for(self._force, self._options.notice_seconds if self._service.open else 0)
            await self._drain()
            self._health.close()
            await self._grpc.stop(_LAST_ANSWERS_SECONDS)
        if self._pages is not None:
            await asyncio.to_thread(self._pages.close)
        _log.info("stopped")

    async def _drain(self) -> None:
        """Every engine finishes what it has; when forced, or when one does not come back, what is left fails at once."""
        seconds = self._options.drain_seconds
        drained = asyncio.gather(*(model.engine.drain(seconds) for model in self._models), return_exceptions=True)
        if not await done_before(self._force, drained, seconds + _LAST_ANSWERS_SECONDS):
            drained.cancel()
            drained = asyncio.gather(*(model.engine.drain(0) for model in self._models), return_exceptions=True)
            await asyncio.wait([drained], timeout=_LAST_ANSWERS_SECONDS)
        for error in drained.result() if drained.done() else ():
            if error is not None:
                _log.error("an engine could not be drained", exc_info=error)

    def _bind(self) -> grpc.aio.Server:
        options = self._options
        guard = Guard(
            NAME,
            default_call_seconds=options.default_call_seconds,
            longest_call_seconds=options.longest_call_seconds,
            on_end=self._metrics.call_ended,
        )
        server = grpc.aio.server(
            interceptors=[guard],
            options=options.transport.grpc_options(options.longest_call_seconds, share_port=self._is_front_end),
            maximum_concurrent_rpcs=options.transport.max_concurrent_calls,
        )
        transformer_pb2_grpc.add_TransformerServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if options.reflection:
            reflection.enable_server_reflection((NAME, _HEALTH, reflection.SERVICE_NAME), server)
        address = options.address(options.port)
        try:
            self.port = server.add_insecure_port(address)
        except RuntimeError:
            raise CannotServe(f"cannot listen on {address}") from None
        return server

    def _set_serving(self, serving: bool) -> None:
        if serving is not self._health.serving:
            _log.log(logging.INFO if serving else logging.WARNING, "serving" if serving else "not serving")
        self._health.set_serving(serving)
        self._metrics.set_ready(serving)
