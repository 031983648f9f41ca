"""What surrounds every call: its id, its deadline, and an answer to whatever goes wrong.

The ``Guard`` makes promises that grpc.aio leaves to each handler:

- bytes that are no message of the method's type are refused as INVALID_ARGUMENT, not UNKNOWN;
- an exception that nobody expected becomes INTERNAL with a request id, never its own text;
- a CancelledError of the engine, not of the caller, becomes a status: otherwise the caller would wait for ever;
- no call lasts for ever: one without a deadline gets the server's, one with a longer one than that allows gets less;
- every call is counted once, with one outcome.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from server.call import (
    PRIORITIES,
    PRIORITY,
    REQUEST_ID,
    TENANT,
    TRACEPARENT,
    Call,
    DeadlinePassed,
    Outcome,
    Trace,
    accepted_request_id,
    current_call,
)
from server.edge.errors import status_of, verdict_on
from server.edge.fan_out import RequestFailed
from server.requests import Failed, Failure, InvalidRequest, Violation

_log = logging.getLogger(__name__)

_UNDECODABLE = object()
_CLOCKS_APART_SECONDS = 0.01
"""A caller's clock begins before ours, by the way of its call to here: at the deadline its cancellation may come first."""


class Guard(grpc.aio.ServerInterceptor):
    """Surrounds every method of the server, each wrapped once.

    Args:
        metered: name of the service whose calls get a deadline and are counted; others (health) are only guarded.
        default_call_seconds: the deadline of a call that has none.
        longest_call_seconds: the cap on one that has.
        on_end: told of every metered call when it has ended.
    """

    def __init__(
        self, metered: str, *, default_call_seconds: float, longest_call_seconds: float, on_end: Callable[[Call], None]
    ) -> None:
        self._metered = f"/{metered}/"
        self._default_call_seconds = default_call_seconds
        self._longest_call_seconds = longest_call_seconds
        self._on_end = on_end
        self._guarded: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method not in self._guarded:
            handler = await continuation(handler_call_details)
            if handler is None or handler.request_streaming:  # unknown method; reflection alone streams requests
                return handler
            self._guarded[method] = self._guard(method, handler)
        return self._guarded[method]

    def _guard(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        streams = handler.response_streaming
        behaviour = handler.unary_stream if streams else handler.unary_unary
        metered = method.startswith(self._metered)

        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            call = _begin(method, context)
            current_call.set(call)
            # Trailing, not initial: once initial metadata is out, clients no longer retry elsewhere what this server refuses.
            context.set_trailing_metadata(((REQUEST_ID, call.request_id), (TRACEPARENT, call.trace.header)))
            async with _answered(call, context, self._on_end if metered else _ignore):
                if request is _UNDECODABLE:
                    raise InvalidRequest([Violation("request", f"the bytes are not a request message of {method}")])
                if not metered:
                    return await behaviour(request, context)
                remaining = context.time_remaining()
                offered = self._default_call_seconds if remaining is None else remaining
                call.longest_seconds = min(offered, self._longest_call_seconds)
                async with _within(None if call.longest_seconds == remaining else call.longest_seconds):
                    return await behaviour(request, context)

        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(guarded, _forgiving(handler.request_deserializer), handler.response_serializer)


def _begin(method: str, context: grpc.aio.ServicerContext) -> Call:
    metadata = dict(context.invocation_metadata() or ())
    tenant = metadata.get(TENANT, "")
    return Call(
        method=method.rpartition("/")[2],
        request_id=accepted_request_id(metadata.get(REQUEST_ID)),
        trace=Trace.continued(metadata.get(TRACEPARENT)),
        tenant=tenant if isinstance(tenant, str) else "",
        priority=PRIORITIES.get(metadata.get(PRIORITY, ""), 0),
    )


def _forgiving(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A failure here would be answered by grpc.aio, before any of our code runs."""

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:
            return _UNDECODABLE

    return decode


@asynccontextmanager
async def _within(seconds: float | None) -> AsyncIterator[None]:
    """Raises DeadlinePassed.

    Args:
        seconds: None when the caller's own deadline comes before any of the server's. gRPC ends the call then, and a second
            clock would race with it: a status sent on a call that has just ended fails, and what a failed batch of operations
            takes, grpc.aio never frees (github.com/grpc/grpc/issues/43360).
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlinePassed(f"no answer within {seconds:.3g} s") from None


@asynccontextmanager
async def _answered(call: Call, context: grpc.aio.ServicerContext, on_end: Callable[[Call], None]) -> AsyncIterator[None]:
    """Turns whatever the block raises into a status, unless the caller is gone or has one already."""
    error: Exception
    try:
        yield
        return
    except grpc.aio.AbortError:
        raise
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # by grpc: the caller left, or its deadline passed
            call.outcome = _end_of_abandoned(context)
            raise
        error = RequestFailed(Failed(Failure.CANCELLED, "the engine cancelled the request"))
        call.outcome = Outcome.CANCELLED
    except grpc.aio.InternalError:  # a write found that the caller is gone
        call.outcome = _end_of_abandoned(context)
        raise asyncio.CancelledError from None
    except Exception as caught:
        error = caught
        call.outcome = verdict_on(error).outcome
    finally:
        # Before the status is sent: that waits for a caller who does not read.
        on_end(call)
        _log.debug("call ended", extra={"method": call.method, "model": call.model, "outcome": call.outcome.value})
    if call.outcome is Outcome.FAILED:
        _log.error("call failed", exc_info=error, extra={"method": call.method, "model": call.model})
    status = status_of(error, call.request_id)
    try:
        await context.abort(status.code, status.details, (*status.trailing_metadata, (TRACEPARENT, call.trace.header)))
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def _end_of_abandoned(context: grpc.aio.ServicerContext) -> Outcome:
    remaining = context.time_remaining()
    return Outcome.CANCELLED if remaining is None or remaining > _CLOCKS_APART_SECONDS else Outcome.DEADLINE


def _ignore(call: Call) -> None:
    """Probes are not counted."""
