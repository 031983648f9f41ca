"""grpc.health.v1 for probes and for clients that watch: SERVING only while every engine can answer.

The servicer of grpcio-health-checking is not used: there a watcher that stops reading holds up every change of status, and one
that keeps reading holds up the server's stop. Here each watcher waits by itself, and ``close`` ends them all.
"""

# ruff: noqa: N802 (methods are named as in the proto)
from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """One answer for all the names it knows; NOT_SERVING until told otherwise."""

    def __init__(self, *services: str) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        return self._serving

    def set_serving(self, serving: bool) -> None:
        if serving != self._serving:
            self._serving = serving
            self._wake()

    def close(self) -> None:
        """Ends every Watch, so that they do not hold up the server's stop."""
        self._closed = True
        self._wake()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthListResponse:
        answers = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in self._services}
        return health_pb2.HealthListResponse(statuses=answers)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                told = status
                await context.write(health_pb2.HealthCheckResponse(status=status))
            if self._closed:
                return
            if self._changed is changed:
                await changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self._serving else _NOT_SERVING

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
