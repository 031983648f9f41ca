"""How calls end when they do not end well."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time

import grpc
import pytest

from protos import transformer_pb2 as pb
from protos import transformer_pb2_grpc
from server.client import CallError
from server.config import TransportLimits
from server.edge import errors, interceptors
from server.logs import JsonFormatter
from server.requests import Encoded, Failed, Failure, Finished, TokensReady
from server.waiting.admission import AdmissionLimits
from tests.server.fake_engine import FakeEngine, hypothesis, says
from tests.server.run_server import Running, encoder, run_server, served_model

PATIENT = 600.0
"""Seconds, for what does not take any: only a machine that is very busy needs them."""
REQUEST = pb.GenerateRequest(inputs=[pb.Input(text="abc")])
TWO = pb.GenerateRequest(inputs=[pb.Input(text="abc"), pb.Input(text="de")])


async def unary(running: Running, request: pb.GenerateRequest = REQUEST, timeout: float | None = PATIENT) -> None:
    await running.stub.Generate(request, timeout=timeout)


async def stream(running: Running, request: pb.GenerateRequest = REQUEST, timeout: float | None = PATIENT) -> None:
    call = running.stub.GenerateStream(request, timeout=timeout)
    try:
        async for _ in call:
            pass
    finally:
        call.cancel()  # grpc.aio does not, when its task is cancelled at the moment in which the request has been sent


both = pytest.mark.parametrize("call", [unary, stream])


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    for _ in range(6_000):  # looks, not seconds: a process that was not given any is not late
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come")


def ended(running: Running, outcome: str, method: str = "Generate", model: str = "dates") -> float:
    return running.value("transformer_requests_total", model=model, method=method, outcome=outcome) or 0


@both
@pytest.mark.parametrize("failure", list(Failure))
async def test_an_engines_failure_becomes_its_status(call, failure: Failure) -> None:  # type: ignore[no-untyped-def]
    engine = FakeEngine(says(Failed(failure, "for the caller's eyes")))
    async with run_server(served_model(engine)) as running:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(running)
        told = CallError.from_rpc(error.value)
        assert told.reason == failure.name
        assert told.message == "for the caller's eyes"
        engine.script = says(Finished((hypothesis((5,)),)))
        await call(running)


@both
@pytest.mark.parametrize("wrong", [ZeroDivisionError("secret"), TimeoutError("secret"), asyncio.CancelledError("secret")])
async def test_an_engine_that_breaks_its_contract_ends_the_call_at_once(call, wrong: BaseException) -> None:  # type: ignore[no-untyped-def]
    async with run_server(served_model(FakeEngine(says(wrong)))) as running:
        started = time.perf_counter()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(running)
        assert time.perf_counter() - started < PATIENT / 2  # not at its deadline
        assert "secret" not in repr(error.value)
        assert error.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)


async def test_an_answer_of_the_wrong_kind_is_the_servers_fault() -> None:
    async with run_server(served_model(FakeEngine(says(Encoded((), (1.0,)))))) as running:
        for call in (unary, stream):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(running)
            assert error.value.code() is grpc.StatusCode.INTERNAL


async def test_a_fault_of_the_server_is_logged_with_the_id_the_caller_gets(caplog: pytest.LogCaptureFixture) -> None:
    async with run_server(served_model(FakeEngine(says(ZeroDivisionError("secret"))))) as running:
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as error:
            await running.stub.Generate(REQUEST, timeout=PATIENT, metadata=(("x-request-id", "mine-42"),))
        assert error.value.details() == "internal error; the server's log has it under request id mine-42"
        assert ended(running, "failed") == 1
    (record,) = [record for record in caplog.records if record.name == "server.edge.interceptors"]
    assert "ZeroDivisionError: secret" in json.loads(JsonFormatter().format(record))["exception"]


@both
async def test_a_cancelled_call_closes_the_engines_iterators(call) -> None:  # type: ignore[no-untyped-def]
    engine = FakeEngine(says(TokensReady(0, (5,), (-1.0,)), asyncio.Event()))
    method = "Generate" if call is unary else "GenerateStream"
    async with run_server(served_model(engine)) as running:
        task = asyncio.create_task(call(running, TWO))
        await until(lambda: engine.live == 2)
        task.cancel()
        await until(lambda: engine.live == 0)
        assert len(engine.closed_early) == 2
        await until(lambda: ended(running, "cancelled", method) == 1)


@both
async def test_a_deadline_closes_the_engines_iterators(call) -> None:  # type: ignore[no-untyped-def]
    engine = FakeEngine(says(asyncio.Event()))
    method = "Generate" if call is unary else "GenerateStream"
    async with run_server(served_model(engine)) as running:
        attempts = 0
        for seconds in (0.15, 1.0, 10.0):
            attempts += 1
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(running, TWO, timeout=seconds)
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if engine.submitted:  # before the deadline, unless the machine is very busy
                break
        await until(lambda: engine.live == 0)
        assert len(engine.closed_early) == len(engine.submitted) == 2
        await until(lambda: ended(running, "deadline", method) == attempts)


@both
async def test_no_status_is_sent_on_a_call_that_grpc_has_ended(call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """It would fail, and grpc.aio does not free what a failed batch of operations takes."""
    sent = list[Exception]()

    def status_of(error: Exception, request_id: str) -> grpc.Status:
        sent.append(error)
        return errors.status_of(error, request_id)

    monkeypatch.setattr(interceptors, "status_of", status_of)
    method = "Generate" if call is unary else "GenerateStream"
    async with run_server(served_model(FakeEngine(says(asyncio.Event())))) as running:
        late = await asyncio.gather(*(call(running, timeout=0.3) for _ in range(30)), return_exceptions=True)
        assert {error.code() for error in late} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        await until(lambda: running.value("transformer_requests_total", model="dates", method=method, outcome="deadline"))
        await until(lambda: len(asyncio.all_tasks()) < 30)
    assert sent == []


@both
async def test_a_call_without_a_deadline_gets_the_servers(call) -> None:  # type: ignore[no-untyped-def]
    engine = FakeEngine(says(asyncio.Event()))
    async with run_server(served_model(engine), longest_call_seconds=0.15) as running:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(running, timeout=None)
        told = CallError.from_rpc(error.value)
    assert told.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert told.message == "no answer within 0.15 s"
    assert engine.live == 0


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    engine = FakeEngine()
    engine.waiting_requests, engine.waiting_tokens = 10, 100
    limits = AdmissionLimits(max_waiting_requests=10, retry_after_seconds=0.2)
    async with run_server(served_model(engine), admission=limits) as running:
        for call in (unary, stream):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(running)
            told = CallError.from_rpc(error.value)
            assert (told.code, told.reason, told.retry_after) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 0.2)
            assert ("grpc-retry-pushback-ms", "200") in tuple(error.value.trailing_metadata())
        assert engine.submitted == []
        assert ended(running, "rejected") == 1
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await running.stub.Generate(pb.GenerateRequest(inputs=[pb.Input(text="")]), timeout=5)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "no work is done for what is refused anyway"
        engine.waiting_requests = engine.waiting_tokens = 0
        await unary(running)


async def test_a_burst_beyond_the_queue_is_refused_in_part() -> None:
    gate, engine = asyncio.Event(), FakeEngine()
    engine.script = lambda request: [gate, Finished((hypothesis((5,)),))]

    class Counting(FakeEngine):
        """Counts what it has taken as waiting, as an engine does that has not begun."""

        @property
        def status(self):  # type: ignore[no-untyped-def]
            self.waiting_requests = self.live
            return super().status

    engine = Counting(engine.script)
    async with run_server(served_model(engine), admission=AdmissionLimits(max_waiting_requests=20)) as running:
        calls = [asyncio.create_task(unary(running)) for _ in range(50)]
        await until(lambda: sum(task.done() for task in calls) == 30)
        assert engine.live == 20
        gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(result is None for result in results) == 20


async def test_a_burst_that_the_event_loop_has_not_seen_yet_is_kept() -> None:
    """gRPC's core cancels calls at random when more than 1,000 wait for the application to take them, unless told otherwise."""
    async with run_server(served_model(FakeEngine())) as running:
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(running.target, options=own) for _ in range(4)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        stubs = [transformer_pb2_grpc.TransformerStub(channel) for channel in channels]
        await asyncio.gather(*(stubs[i % 4].Generate(REQUEST, timeout=PATIENT) for i in range(2500)))
        await asyncio.gather(*(channel.close() for channel in channels))


async def test_calls_beyond_those_a_connection_holds_wait_in_the_client() -> None:
    """Else gRPC's core counts calls whose answers have been sent, too, and refuses what their client begins in their place."""
    async with run_server(served_model(FakeEngine()), transport=TransportLimits(max_streams_per_connection=100)) as running:
        await asyncio.gather(*(unary(running) for _ in range(1000)))


@both
@pytest.mark.parametrize(
    ("offered", "kept"), [("abc-123", True), ("a" * 128, True), ("a" * 129, False), ("two words", False), ('"}{', False)]
)
async def test_a_plain_request_id_comes_back(call, offered: str, kept: bool) -> None:  # type: ignore[no-untyped-def]
    async with run_server(served_model(FakeEngine())) as running:
        method = running.stub.Generate if call is unary else running.stub.GenerateStream
        answer = method(REQUEST, timeout=PATIENT, metadata=(("x-request-id", offered),))
        if call is stream:
            assert [message async for message in answer]
        returned = dict(await answer.trailing_metadata())["x-request-id"]
    assert (returned == offered) is kept
    assert kept or len(returned) == 16


@both
@pytest.mark.parametrize("fails", [False, True])
async def test_trace_context_comes_back_with_the_calls_own_span(call, fails: bool) -> None:  # type: ignore[no-untyped-def]
    failed = Failed(Failure.ENGINE, "gone")
    async with run_server(served_model(FakeEngine(says(failed) if fails else None))) as running:
        method = running.stub.Generate if call is unary else running.stub.GenerateStream
        answer = method(REQUEST, timeout=PATIENT, metadata=(("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"),))
        with contextlib.suppress(grpc.aio.AioRpcError):
            _ = [message async for message in answer] if call is stream else await answer
        assert (await answer.code() is grpc.StatusCode.OK) is not fails
        version, trace, span, flags = dict(await answer.trailing_metadata())["traceparent"].split("-")
    assert (version, trace, flags) == ("00", "a" * 32, "01")
    assert len(span) == 16
    assert span != "b" * 16


async def test_a_call_without_a_request_id_gets_one() -> None:
    async with run_server(served_model(FakeEngine())) as running:
        ids = [
            dict(await running.stub.Generate(REQUEST, timeout=PATIENT).trailing_metadata())["x-request-id"] for _ in range(2)
        ]
    assert ids[0] != ids[1]


async def test_counters_are_the_callers_ledger() -> None:
    never = asyncio.Event()
    engine = FakeEngine()
    async with run_server(served_model(engine), encoder(FakeEngine())) as running:
        named = pb.GenerateRequest(model="dates", inputs=REQUEST.inputs)
        for _ in range(3):
            await unary(running, named)
        for wrong in (pb.GenerateRequest(model="dates"), pb.GenerateRequest(model="x" * 100, inputs=REQUEST.inputs)):
            with pytest.raises(grpc.aio.AioRpcError):
                await unary(running, wrong)
        with pytest.raises(grpc.aio.AioRpcError):
            await running.channel.unary_unary("/transformer.v1.Transformer/Generate")(b"\xff", timeout=PATIENT)
        engine.script = says(never)
        with pytest.raises(grpc.aio.AioRpcError):
            await unary(running, named, timeout=0.1)
        await until(lambda: ended(running, "deadline") == 1)
        assert ended(running, "ok") == 3
        assert ended(running, "invalid") == 1
        assert ended(running, "invalid", model="") == 1
        assert ended(running, "not_found", model="") == 1
        counted = running.value("transformer_request_duration_seconds_count", model="dates", method="Generate")
        assert counted == 5
        assert running.value("transformer_request_output_tokens_sum", model="dates") == 3 * 4
