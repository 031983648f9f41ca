"""Startup, health and the drain."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import transformer_pb2 as pb
from server.client import CallError
from server.config import ServerOptions
from server.lifecycle import CannotServe
from server.metrics import Metrics
from server.requests import Finished
from server.server import Server
from tests.server.fake_engine import FakeEngine, hypothesis
from tests.server.run_server import Running, encoder, run_server, served_model

SERVICE = "transformer.v1.Transformer"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST = pb.GenerateRequest(inputs=[pb.Input(text="abc")])


async def health(running: Running, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(running.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status


async def watched(running: Running) -> AsyncIterator[int]:
    stub = health_pb2_grpc.HealthStub(running.channel)
    async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE)):
        yield answer.status


async def test_probes_are_answered_while_engines_warm_up_and_calls_are_told_to_come_back() -> None:
    engine = FakeEngine()
    engine.warm.clear()
    async with run_server(served_model(engine), warm=False) as running:
        statuses = watched(running)
        assert [await health(running, name) for name in ("", SERVICE)] == [NOT_SERVING] * 2
        assert await anext(statuses) == NOT_SERVING
        assert running.value("transformer_ready") == 0
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await running.stub.Generate(REQUEST, timeout=5)
        told = CallError.from_rpc(error.value)
        assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "STARTING")
        engine.warm.set()
        assert await anext(statuses) == SERVING
        assert [await health(running, name) for name in ("", SERVICE)] == [SERVING] * 2
        assert running.value("transformer_ready") == 1
        await running.stub.Generate(REQUEST, timeout=5)
        await statuses.aclose()  # type: ignore[attr-defined]


async def test_health_knows_its_services_only() -> None:
    async with run_server(served_model(FakeEngine())) as running:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health(running, "no.such.Service")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        stub = health_pb2_grpc.HealthStub(running.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=5)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
        listed = (await stub.List(health_pb2.HealthListRequest(), timeout=5)).statuses
        assert {name: answer.status for name, answer in listed.items()} == {"": SERVING, SERVICE: SERVING}


async def test_one_dead_engine_turns_health_within_a_second() -> None:
    dead = FakeEngine()
    async with run_server(served_model(FakeEngine()), encoder(dead)) as running:
        statuses = watched(running)
        assert await anext(statuses) == SERVING
        dead.alive = False
        async with asyncio.timeout(1):
            assert await anext(statuses) == NOT_SERVING
        assert running.value("transformer_ready") == 0
        dead.alive = True
        async with asyncio.timeout(1):
            assert await anext(statuses) == SERVING
        await statuses.aclose()  # type: ignore[attr-defined]


async def test_stopping_turns_health_first_finishes_what_is_in_flight_and_refuses_what_is_new() -> None:
    gate, engine = asyncio.Event(), FakeEngine()
    engine.script = lambda request: [gate, Finished((hypothesis(request.input_ids),))]
    async with run_server(served_model(engine), notice_seconds=0.1) as running:
        statuses = watched(running)
        assert await anext(statuses) == SERVING
        in_flight = [running.stub.Generate(REQUEST, timeout=10) for _ in range(3)]
        while engine.live < 3:
            await asyncio.sleep(0.005)
        running.server.ask_to_stop()
        assert await anext(statuses) == NOT_SERVING
        assert engine.drains == [], "calls are still taken while clients turn away"
        while not engine.drains:
            await asyncio.sleep(0.005)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await running.stub.Generate(REQUEST, timeout=5)
        told = CallError.from_rpc(error.value)
        assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        gate.set()
        answers = await asyncio.gather(*in_flight)
        assert all(answer.results for answer in answers)
        async with asyncio.timeout(2):
            await running.life
        assert [status async for status in statuses] == [], "watchers are let go"


async def test_a_second_signal_does_not_wait() -> None:
    engine = FakeEngine(lambda request: [asyncio.Event()])
    async with run_server(served_model(engine), drain_seconds=60, notice_seconds=60) as running:
        call = running.stub.Generate(REQUEST, timeout=30)
        while not engine.live:
            await asyncio.sleep(0.005)
        running.server.ask_to_stop()
        await asyncio.sleep(0.05)
        assert not running.life.done()
        running.server.ask_to_stop()
        async with asyncio.timeout(3):
            await running.life
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_stopping_during_warm_up_does_not_wait_for_it() -> None:
    engine = FakeEngine()
    engine.warm.clear()
    async with run_server(served_model(engine), warm=False) as running:
        running.server.ask_to_stop()
        async with asyncio.timeout(2):
            await running.life


async def test_an_engine_that_cannot_start_ends_the_server_with_its_error() -> None:
    class Broken(FakeEngine):
        async def start(self) -> None:
            raise LookupError("no device")

    server = Server([served_model(Broken())], ServerOptions(port=0, http_port=0, notice_seconds=0), Metrics("test"))
    async with asyncio.timeout(3):
        with pytest.raises(LookupError, match="no device"):
            await server.serve()


@pytest.mark.parametrize("taken", ["port", "http_port"])
async def test_a_taken_port_is_refused_in_one_line(taken: str) -> None:
    async with run_server(served_model(FakeEngine())) as running:
        ports = {"port": 0, "http_port": 0, taken: getattr(running.server, taken)}
        second = Server([served_model(FakeEngine())], ServerOptions(notice_seconds=0, **ports), Metrics("test"))
        with pytest.raises(CannotServe, match=rf"^cannot listen on 127\.0\.0\.1:{ports[taken]}"):
            await second.serve()
        await running.stub.Generate(REQUEST, timeout=5)


async def test_reflection_is_off_unless_asked_for() -> None:
    async def services(running: Running) -> list[str]:
        call = reflection_pb2_grpc.ServerReflectionStub(running.channel).ServerReflectionInfo(timeout=5)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
        return [service.name for service in answer.list_services_response.service]

    async with run_server(served_model(FakeEngine()), reflection=True) as running:
        assert SERVICE in await services(running)
    async with run_server(served_model(FakeEngine())) as running:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await services(running)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_http_has_metrics_and_nothing_else() -> None:
    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{running.server.http_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""

    async with run_server(served_model(FakeEngine())) as running:
        status, body = await asyncio.to_thread(get, "/metrics")
        assert (status, "transformer_ready 1.0" in body) == (200, True)
        for path in ("/", "/etc/passwd", "/metrics/../x"):
            assert (await asyncio.to_thread(get, path))[0] == 404


async def test_protobuf_in_pure_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("google.protobuf.internal.api_implementation.Type", lambda: "python")
    with pytest.raises(CannotServe, match="must run on its upb backend, not 'python'"):
        await Server([served_model(FakeEngine())], ServerOptions(port=0, http_port=0), Metrics("test")).serve()
