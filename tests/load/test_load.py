"""The load test itself, for real: a generator process against a fake server on the loopback address."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.load import stage as stage_module
from tests.load.__main__ import app
from tests.load.arrivals import poisson
from tests.load.fake_server import FakeTransformer, serve
from tests.load.ledger import OK, Slo, summarise
from tests.load.plan import Plan
from tests.load.stage import Outcome, StageError, run_stage
from tests.load.sweep import probe_capacity, rates_around


def plan_for(target: str, schedule: list[float], **others: object) -> Plan:
    return Plan(target=target, texts=["3. März 2026", "1 May 2020"], seed=1, schedule=schedule, seconds=1.0, **others)  # type: ignore[arg-type]


async def test_every_planned_request_is_sent_and_measured() -> None:
    schedule = poisson(40, 1.0, seed=5)
    fake = FakeTransformer(pause=0.02)
    fake.fail_every = 10
    async with serve(fake) as target:
        outcome = await asyncio.to_thread(run_stage, plan_for(target, schedule))
    assert sorted(record.planned for record in outcome.records) == pytest.approx(schedule)
    assert outcome.model.startswith("fake (encoder_decoder, fp32, cpu")
    figures = summarise(outcome.records, offered=40, seconds=1.0, slo=Slo(), cpu_seconds=outcome.cpu_seconds)
    assert figures.errors == {"RESOURCE_EXHAUSTED": len(schedule) // 10}
    assert figures.first_token and figures.first_token.p50 >= 0.02
    assert figures.inter_token and 0.01 < figures.inter_token.p50 < 0.2
    assert figures.end_to_end and figures.end_to_end.p50 >= 0.04
    assert {record.tokens for record in outcome.records if record.code == OK} == {3}


async def test_a_stall_is_felt_by_every_request_planned_during_it() -> None:
    schedule = [index / 100 for index in range(100)]
    fake = FakeTransformer(pause=0.001)
    async with serve(fake) as target:
        stalling = asyncio.create_task(_stall(fake, seconds=0.5))
        outcome = await asyncio.to_thread(run_stage, plan_for(target, schedule))
        await stalling
    # A client that waits for its answer would have seen the stall once; here half of all requests did, and none was held back.
    late = [record for record in outcome.records if record.done - record.planned > 0.1]
    assert len(outcome.records) == 100
    assert 30 <= len(late) <= 90
    assert max(record.done - record.planned for record in late) > 0.4
    assert max(record.sent - record.planned for record in outcome.records) < 0.4


async def _stall(fake: FakeTransformer, seconds: float) -> None:
    while fake.calls < 10:
        await asyncio.sleep(0.002)
    fake.gate.clear()
    await asyncio.sleep(seconds)
    fake.gate.set()


async def test_unary_calls_have_no_first_token() -> None:
    async with serve(FakeTransformer()) as target:
        outcome = await asyncio.to_thread(run_stage, plan_for(target, [0.0, 0.01], stream=False))
    assert [(record.code, record.first, record.tokens) for record in outcome.records] == [(OK, None, 3)] * 2


async def test_an_unknown_model_is_said_once() -> None:
    async with serve(FakeTransformer()) as target:
        with pytest.raises(StageError, match="NOT_FOUND: no model named 'other'"):
            await asyncio.to_thread(run_stage, plan_for(target, [0.0], model="other"))


def test_a_generator_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "START_UP_SECONDS", -1.8)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StageError, match="was killed"):
        run_stage(plan_for(f"127.0.0.1:{silent.getsockname()[1]}", [0.0], deadline=0.2))


async def test_the_probe_finds_the_capacity_in_closed_loop() -> None:
    async with serve(FakeTransformer(pause=0.1)) as target:

        def first_only(plan: Plan) -> Outcome:
            if plan.concurrency != 16:
                raise StageError("enough")
            return run_stage(plan)

        outcome = await asyncio.to_thread(first_only, Plan(target=target, texts=["x"], seed=1, seconds=0.5, concurrency=16))
    # Sixteen at a time, 0.2 s each: about three rounds before the end, never more than sixteen in flight.
    assert 16 <= len(outcome.records) <= 64

    def scripted(plan: Plan) -> Outcome:
        assert plan.concurrency is not None
        rate = {16: 100, 64: 200, 256: 205}[plan.concurrency]
        return Outcome(records=[outcome.records[0]] * int(rate * plan.seconds), cpu_seconds=0, model="")

    base = Plan(target="localhost:1", texts=["x"], seed=1, seconds=1.0, schedule=[])
    assert probe_capacity(base, scripted, seconds=10) == 205


def test_rates_lie_around_the_capacity() -> None:
    assert rates_around(1234) == [120, 310, 620, 860, 1000, 1200, 1500]
    assert rates_around(3.21) == [0.32, 0.8, 1.6, 2.2, 2.7, 3.2, 3.9]


async def test_the_command_line_ends_in_a_table_a_file_and_a_curve(tmp_path: Path) -> None:
    figures, curve = tmp_path / "load.json", tmp_path / "load.png"
    async with serve(FakeTransformer()) as target:
        arguments = ["--target", target, "--rate", "20", "--seconds", "0.5", "--json", str(figures), "--png", str(curve)]
        ran = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert ran.exit_code == 0, ran.output
    assert "| offered/s" in ran.output
    assert figures.is_file() and curve.is_file()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target", "192.0.2.1:50051", "--rate", "1"], "on this machine"),
        (["--rate", "1e6", "--seconds", "600"], "more than the limit"),
        (["--rate", "1", "--sweep"], "exclude each other"),
        (["--rate", "1", "--inputs", "/nonexistent"], "No such file"),
        (["--rate", "1", "--json", "/nonexistent/x.json"], "no such directory"),
        (["--bogus"], "bogus"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: list[str], reason: str) -> None:
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 2
    assert reason in ran.output
