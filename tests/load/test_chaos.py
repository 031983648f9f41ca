"""A short form of ``python -m tests.load.chaos``: the real command, its engine killed and stopped under load."""

from __future__ import annotations

from pathlib import Path

from tests.load.chaos import Fault, torment
from tests.load.running import server_process


async def test_a_server_outlives_its_engine_and_every_call_gets_one_status(bundles: dict[str, Path]) -> None:
    arguments = ("--device", "cpu", "--threads", "1", "--engines", "1", "--max-rows", "8", "--stall-seconds", "1.5")
    async with server_process(bundles["encoder_decoder"], *arguments) as server:
        report = await torment(server, [Fault.KILL, Fault.STOP, Fault.KILL], callers=12)
        assert report.problems == []
        for round in report.rounds:
            assert round.noticed < (1.0 if round.fault is Fault.KILL else 3.5)
            assert round.ended - round.noticed < 2
        assert sum(round.in_flight for round in report.rounds) > 10
        assert report.statuses["OK"] > 50
        assert report.statuses["UNAVAILABLE"] > 0
