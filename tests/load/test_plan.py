from __future__ import annotations

import pytest

from tests.load.plan import Plan, PlanError, require_loopback


@pytest.mark.parametrize("target", ["localhost:50051", "127.0.0.1:50051", "127.8.9.1:1", "[::1]:50051"])
def test_this_machine_is_allowed(target: str) -> None:
    require_loopback(target)


@pytest.mark.parametrize(
    "target",
    ["10.0.0.1:50051", "0.0.0.0:50051", "example.com:50051", "dns:///localhost:50051", "localhost.example.com:1", "[::]:1"],
)
def test_any_other_machine_is_refused(target: str) -> None:
    with pytest.raises(PlanError, match="on this machine"):
        require_loopback(target)


@pytest.mark.parametrize("target", ["", "localhost", "localhost:", "localhost:x", "localhost:0", "localhost:70000", ":50051"])
def test_a_target_is_a_host_and_a_port(target: str) -> None:
    with pytest.raises(PlanError, match="HOST:PORT"):
        require_loopback(target)


def test_a_plan_survives_the_pipe() -> None:
    plan = Plan(target="localhost:1", texts=["3. März 2026"], seed=1, schedule=[0.5], seconds=1.0)
    assert "\n" not in plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_is_open_or_closed() -> None:
    with pytest.raises(PlanError):
        Plan(target="localhost:1", texts=["x"], seed=1, seconds=1.0)
    with pytest.raises(PlanError):
        Plan(target="localhost:1", texts=["x"], seed=1, seconds=1.0, schedule=[], concurrency=1)
