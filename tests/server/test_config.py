from __future__ import annotations

import pytest

from server.config import ConfigError, EngineOptions, EnginePlace, ServerOptions, TransportLimits, parse_tenants
from server.models import Models
from server.waiting.admission import AdmissionLimits, Tenant
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import served_model


def test_defaults_listen_on_this_machine_alone() -> None:
    options = ServerOptions()
    assert (options.address(options.port), options.http_port) == ("127.0.0.1:50051", 8080)


def test_ipv6_addresses_are_bracketed() -> None:
    assert ServerOptions(host="::1").address(50051) == "[::1]:50051"


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        ServerOptions(
            port=70_000,
            front_ends=0,
            drain_seconds=-1,
            longest_call_seconds=float("nan"),
            admission=AdmissionLimits(max_waiting_requests=0),
        )
    assert [problem.split()[0] for problem in refused.value.problems] == [
        "front_ends",
        "drain_seconds",
        "port",
        "max_waiting_requests",
        "longest_call_seconds",
    ]


def test_two_listeners_cannot_share_a_port() -> None:
    with pytest.raises(ConfigError, match="port and http_port must differ"):
        ServerOptions(port=8080)
    ServerOptions(port=0, http_port=0)


def test_engine_options_are_counts() -> None:
    with pytest.raises(ConfigError, match="max_rows must be at least 1, not 0; threads must be at least 1, not -2"):
        EngineOptions(max_rows=0, threads=-2)


def test_a_second_server_never_shares_a_port() -> None:
    assert ("grpc.so_reuseport", 0) in TransportLimits().grpc_options(600)


def test_connections_outlive_their_longest_call() -> None:
    options = dict(TransportLimits().grpc_options(600))
    assert options["grpc.max_connection_age_grace_ms"] > 600_000


def test_models_have_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="two models are named 'dates'"):
        Models([served_model(FakeEngine()), served_model(FakeEngine())])
    with pytest.raises(ConfigError, match="at least one model"):
        Models([])


def test_tenants_are_written_short() -> None:
    assert parse_tenants(["search=4:200", "batch", "nightly=1:50:8", "cheap::4", "eu.mail=0.5"]) == {
        "search": Tenant(weight=4.0, max_waiting=200),
        "batch": Tenant(),
        "nightly": Tenant(max_waiting=50, max_rows=8),
        "cheap": Tenant(max_rows=4),
        "eu.mail": Tenant(weight=0.5),
    }


@pytest.mark.parametrize(
    "text", ["", "=4", "a=", "a=0", "a:0", "a::0", "a:1:", "a:::1", "a=-1", "a=nan", "two words", "a" * 65]
)
def test_a_tenant_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a tenant is written NAME"):
        parse_tenants([text])


def test_two_tenants_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two tenants are named 'a'"):
        parse_tenants(["a=1", "a=2"])


def test_engines_in_the_servers_own_process_cannot_be_several() -> None:
    with pytest.raises(ConfigError) as error:
        EngineOptions(place=EnginePlace.IN_PROCESS, engines=2, stall_seconds=0.0)
    assert error.value.problems == [
        "stall_seconds must be above 0, not 0",
        "engines must be 1 in the server's own process, not 2",
    ]
