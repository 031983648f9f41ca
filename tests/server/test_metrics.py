from __future__ import annotations

import shutil
import subprocess
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import transformer_pb2 as pb
from server.batch.step_stats import StepStats
from server.engines.engine_client import EngineStatus
from server.metrics import Metrics
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import Running, encoder, run_server, served_model

COUNTERS = {
    "transformer_requests_total": {"model", "method", "outcome"},
    "transformer_input_tokens_total": {"model"},
    "transformer_output_tokens_total": {"model"},
    "transformer_wasted_tokens_total": {"model"},
    "transformer_steps_total": {"model"},
    "transformer_engine_restarts_total": {"model", "reason"},
    "transformer_front_end_restarts_total": {"reason"},
    "transformer_step_rows_total": {"model"},
    "transformer_step_seconds_total": {"model", "part"},
}
HISTOGRAMS = {
    "transformer_request_duration_seconds": {"model", "method"},
    "transformer_time_to_first_token_seconds": {"model"},
    "transformer_inter_token_latency_seconds": {"model"},
    "transformer_queue_duration_seconds": {"model"},
    "transformer_step_duration_seconds": {"model"},
    "transformer_request_input_tokens": {"model"},
    "transformer_request_output_tokens": {"model"},
}
GAUGES = {
    "transformer_requests_running": {"model"},
    "transformer_requests_waiting": {"model"},
    "transformer_tokens_waiting": {"model"},
    "transformer_rows_running": {"model"},
    "transformer_rows_capacity": {"model"},
    "transformer_engines_up": {"model"},
    "transformer_engine_progress_age_seconds": {"model"},
    "transformer_ready": set(),
    "transformer_front_ends_up": set(),
    "transformer_model_info": {"model", "family", "task", "precision", "device", "fingerprint"},
    "transformer_build_info": {"version"},
}
STEP = StepStats(
    seconds=0.010,
    runtime_seconds=0.008,
    rows=5,
    new_tokens=4,
    joined=("a", "b"),
    encoded_tokens=17,
    live_requests=3,
    live_rows=5,
    row_capacity=64,
    waiting_requests=0,
    waiting_tokens=0,
    queue_seconds=(0.001, 0.002),
    wasted_tokens=2,
)


def scrape(running: Running) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{running.server.http_port}/metrics", timeout=5) as response:
        text: str = response.read().decode()
    return text


async def traffic(running: Running) -> None:
    request = pb.GenerateRequest(model="dates", inputs=[pb.Input(text="abc"), pb.Input(text="de")])
    await running.stub.Generate(request, timeout=5)
    async for _ in running.stub.GenerateStream(request, timeout=5):
        pass
    await running.stub.Classify(pb.ClassifyRequest(model="mood", inputs=[pb.Input(text="a")]), timeout=5)
    running.metrics.step_done("dates", STEP)


async def test_the_series_are_exactly_those_that_dashboards_are_built_on() -> None:
    async with run_server(served_model(FakeEngine()), encoder(FakeEngine())) as running:
        await traffic(running)
        found = {}
        for family in text_string_to_metric_families(scrape(running)):
            for sample in family.samples:
                name = sample.name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
                found[name] = set(sample.labels) - ({"le"} if family.type == "histogram" else set())
    assert found == COUNTERS | HISTOGRAMS | GAUGES


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
async def test_promtool_finds_nothing_wrong() -> None:
    async with run_server(served_model(FakeEngine()), encoder(FakeEngine())) as running:
        await traffic(running)
        text = scrape(running)
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


async def test_calls_inputs_and_outputs_are_counted_as_callers_see_them() -> None:
    async with run_server(served_model(FakeEngine()), encoder(FakeEngine())) as running:
        await traffic(running)
        for method in ("Generate", "GenerateStream"):
            assert running.value("transformer_requests_total", model="dates", method=method, outcome="ok") == 1
        assert running.value("transformer_requests_total", model="mood", method="Classify", outcome="ok") == 1
        assert running.value("transformer_request_input_tokens_count", model="dates") == 4
        assert running.value("transformer_request_input_tokens_sum", model="dates") == 2 * (4 + 3)
        assert running.value("transformer_request_output_tokens_sum", model="dates") == 2 * (4 + 3)
        assert running.value("transformer_time_to_first_token_seconds_count", model="dates") == 2
        assert running.value("transformer_inter_token_latency_seconds_count", model="dates") == 2 + 1


def test_a_step_becomes_its_series() -> None:
    metrics = Metrics("1.2.3")
    for _ in range(3):
        metrics.step_done("m", STEP)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"transformer_{name}", {"model": "m", **labels})

    assert value("steps_total") == 3
    assert value("step_rows_total") == 15
    assert value("input_tokens_total") == 51
    assert value("output_tokens_total") == 12
    assert value("wasted_tokens_total") == 6
    assert value("step_seconds_total", part="runtime") == pytest.approx(0.024)
    assert value("step_seconds_total", part="host") == pytest.approx(0.006)
    assert value("step_duration_seconds_count") == 3
    assert value("queue_duration_seconds_count") == 6
    assert metrics.registry.get_sample_value("transformer_build_info", {"version": "1.2.3"}) == 1


async def test_where_an_engine_stands_is_read_when_asked_for() -> None:
    status = EngineStatus(
        alive=True,
        live_rows=12,
        waiting_requests=7,
        waiting_tokens=91,
        live_requests=3,
        row_capacity=64,
        engines_up=2,
        progress_age=1.5,
    )

    class Standing(FakeEngine):
        @property
        def status(self) -> EngineStatus:
            return replace(status, alive=self.alive)

    engine = Standing()
    async with run_server(served_model(engine)) as running:
        names = ("requests_running", "rows_running", "rows_capacity", "requests_waiting", "tokens_waiting")
        assert [running.value(f"transformer_{name}", model="dates") for name in names] == [3, 12, 64, 7, 91]
        assert running.value("transformer_engine_progress_age_seconds", model="dates") == 1.5
        assert running.value("transformer_engines_up", model="dates") == 2
        engine.alive = False
        assert running.value("transformer_engines_up", model="dates") == 0


async def test_series_begin_at_zero() -> None:
    async with run_server(served_model(FakeEngine())) as running:
        for name in ("input_tokens_total", "steps_total", "time_to_first_token_seconds_count", "rows_running"):
            assert running.value(f"transformer_{name}", model="dates") == 0


async def test_a_strangers_model_name_becomes_no_label() -> None:
    async with run_server(served_model(FakeEngine())) as running:
        call = running.stub.Generate(pb.GenerateRequest(model="x-123", inputs=[pb.Input(text="a")]), timeout=5)
        assert (await call.code()).name == "NOT_FOUND"
        assert "x-123" not in scrape(running)
