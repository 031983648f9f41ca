"""One call, several engine requests: run together, answered in order, the first failure ends the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing

from server.engines.engine_client import EngineClient
from server.requests import Encoded, EncodingRequest, Failed, Failure, Finished, GenerationRequest, TokensReady

EngineRequest = GenerationRequest | EncodingRequest
Progress = TokensReady | Finished | Encoded


class RequestFailed(Exception):
    """The engine ended a request without a result."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class EngineBroken(RuntimeError):
    """The engine broke the contract of ``EngineClient``."""


async def gather_results(
    engine: EngineClient, requests: Sequence[EngineRequest], handover: AbstractContextManager[None]
) -> list[Finished | Encoded]:
    """The result of each request, in order.

    Args:
        handover: entered before the requests go to the engine, left once it has them; may refuse by raising.

    Raises:
        RequestFailed: for the first request that fails; the others are cancelled.
    """
    try:
        async with asyncio.TaskGroup() as group:
            with handover:
                tasks = [group.create_task(_result(engine, request)) for request in requests]
                await asyncio.sleep(0)  # every task takes its first step, which is when the engine gets the request
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def merge_events(
    engine: EngineClient, requests: Sequence[EngineRequest], handover: AbstractContextManager[None], *, capacity: int
) -> AsyncGenerator[tuple[int, Progress], None]:
    """The events of all requests as one stream of (position of the request, event); closing it cancels what still runs.

    Args:
        handover: as for ``gather_results``.
        capacity: events held for a reader that is slower than the engine; beyond them the engine's iterators wait.

    Raises:
        RequestFailed: for the first request that fails.
    """
    queue: asyncio.Queue[tuple[int, Progress] | Exception] = asyncio.Queue(capacity)

    async def feed(position: int, request: EngineRequest) -> None:
        try:
            async with aclosing(_progress(engine, request)) as events:
                async for event in events:
                    await queue.put((position, event))
        except Exception as error:
            await queue.put(error)

    tasks: list[asyncio.Task[None]] = []
    try:
        with handover:
            tasks += [asyncio.create_task(feed(position, request)) for position, request in enumerate(requests)]
            await asyncio.sleep(0)
        unfinished = len(requests)
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            unfinished -= not isinstance(item[1], TokensReady)
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _result(engine: EngineClient, request: EngineRequest) -> Finished | Encoded:
    async with aclosing(_progress(engine, request)) as events:
        async for event in events:
            if not isinstance(event, TokensReady):
                return event
    raise AssertionError("unreachable: the last event is a result, or was raised")


async def _progress(engine: EngineClient, request: EngineRequest) -> AsyncGenerator[Progress, None]:
    """A request's events up to its result. Everything else an engine may do arrives as an exception."""
    submitted = engine.submit(request)
    async with aclosing(submitted) as events:
        try:
            async for event in events:
                if isinstance(event, Failed):
                    raise RequestFailed(event)
                yield event
                if not isinstance(event, TokensReady):
                    return
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RequestFailed(Failed(Failure.CANCELLED, "the engine cancelled the request")) from None
    raise EngineBroken(f"request {request.id} ended without a result")
