"""A full server refuses, and the bare one beside it costs less."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from tests.bench.call_cost import answered, bare_server, cost, full_server, refused


async def test_a_full_server_refuses_and_a_bare_one_costs_less(bundles: dict[str, Path]) -> None:
    async with full_server(bundles["encoder_decoder"]) as (target, pid), bare_server() as (bare_target, bare_pid):
        for call in (refused, answered):
            ours = await cost(target, pid, call, 400, 8)
            bare = await cost(bare_target, bare_pid, call, 400, 8)
            assert ours.server > bare.server > 0
            assert 0 < bare.caller < 0.01


async def test_a_call_that_ends_otherwise_is_no_measurement(bundles: dict[str, Path]) -> None:
    async with full_server(bundles["encoder_decoder"]) as (target, pid):
        with pytest.raises(ExceptionGroup) as error:
            await cost(target, pid, lambda stub: refused(stub), 100, 1)  # taken for a call that should be answered
        assert isinstance(error.value.exceptions[0], grpc.aio.AioRpcError)
