"""Fields that must agree: with each other, and with the server that they start."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
import yaml

from server.config import EngineOptions, ServerOptions
from tests.deploy.manifests import BUILDS, OVERLAYS, ROOT, container, flags, needs_kubectl, only, render

pytestmark = [needs_kubectl, pytest.mark.parametrize("build", BUILDS, ids="+".join)]

DEFAULTS = ServerOptions()
Build = tuple[str, ...]


def pod(build: Build) -> dict[str, Any]:
    found = only(build, "Deployment")["spec"]["template"]
    assert isinstance(found, dict)
    return found


def test_ports_are_the_servers_own(build: Build) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(build)["ports"]}
    assert ports == {"grpc": DEFAULTS.port, "http": DEFAULTS.http_port}
    (served,) = only(build, "Service")["spec"]["ports"]
    assert (served["port"], served["targetPort"]) == (DEFAULTS.port, "grpc")
    assert pod(build)["metadata"]["annotations"]["prometheus.io/port"] == str(DEFAULTS.http_port)
    let_in = [port["port"] for rule in only(build, "NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]]
    assert let_in == [DEFAULTS.port, DEFAULTS.http_port]


def test_probes_ask_for_health_names_that_the_server_answers(build: Build) -> None:
    # The proto package and service, and the empty name of grpc.health.v1.
    proto = (ROOT / "protos" / "transformer.proto").read_text(encoding="utf-8")
    package, service = (re.search(pattern, proto, re.MULTILINE) for pattern in (r"^package ([\w.]+);", r"^service (\w+)"))
    assert package and service
    names = {"", f"{package[1]}.{service[1]}"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container(build)[probe]["grpc"]
        assert asked["port"] == DEFAULTS.port
        assert asked["service"] in names


def test_liveness_is_more_patient_than_readiness(build: Build) -> None:
    def patience(probe: str) -> int:
        fields = container(build)[probe]
        return int(fields["periodSeconds"] * fields["failureThreshold"])

    assert patience("livenessProbe") >= 4 * patience("readinessProbe")
    assert patience("startupProbe") >= 120


def test_the_grace_period_holds_the_whole_drain(build: Build) -> None:
    drain = float(flags(build).get("drain-seconds", DEFAULTS.drain_seconds))
    notice = float(flags(build).get("notice-seconds", DEFAULTS.notice_seconds))
    before = container(build)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(build)["spec"]["terminationGracePeriodSeconds"] >= before + notice + drain + 10


def test_every_selector_finds_the_pods(build: Build) -> None:
    labels = pod(build)["metadata"]["labels"].items()
    spread = [constraint["labelSelector"]["matchLabels"] for constraint in pod(build)["spec"]["topologySpreadConstraints"]]
    selectors = [
        only(build, "Deployment")["spec"]["selector"]["matchLabels"],
        only(build, "Service")["spec"]["selector"],
        only(build, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(build, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *spread,
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)
    scaled = only(build, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", only(build, "Deployment")["metadata"]["name"])
    assert pod(build)["spec"]["serviceAccountName"] == only(build, "ServiceAccount")["metadata"]["name"]


def test_the_address_that_the_guide_gives_is_the_services(build: Build) -> None:
    service = only(build, "Service")
    address = (
        f"dns:///{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    )
    assert service["spec"]["clusterIP"] == "None"
    assert f"`{address}`" in (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")


def test_everything_lives_in_one_namespace_that_enforces_the_restricted_profile(build: Build) -> None:
    namespace = only(build, "Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = {document["metadata"]["namespace"] for document in render(*build) if document["kind"] != "Namespace"}
    assert others == {namespace["name"]}


def test_the_pod_has_no_rights(build: Build) -> None:
    spec = pod(build)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 10_000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(build)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & spec.keys()
    assert only(build, "NetworkPolicy")["spec"].get("egress", []) == []


def test_the_server_is_started_with_flags_that_it_has(build: Build) -> None:
    main = pytest.importorskip("server.__main__", reason="the server's command line is not there yet")
    known = {flag for parameter in typer.main.get_command(main.app).params for flag in parameter.opts}
    assert {f"--{name}" for name in flags(build)} <= known


def test_the_server_is_started_with_values_that_it_takes(build: Build) -> None:
    given = flags(build)
    assert given.get("host") == "0.0.0.0", "inside a pod, the loopback address is out of reach"
    ServerOptions(host=given["host"], drain_seconds=float(given["drain-seconds"]))
    EngineOptions(
        device=given.get("device", "auto"),  # type: ignore[arg-type]
        threads=int(given["threads"]) if "threads" in given else None,
        engines=int(given["engines"]) if "engines" in given else None,
    )


def test_the_bundle_lies_where_the_server_looks(build: Build) -> None:
    bundle = container(build)["args"][0]
    mounts = [mount for mount in container(build).get("volumeMounts", []) if mount["mountPath"].startswith("/bundles")]
    volumes = {volume["name"] for volume in pod(build)["spec"]["volumes"]}
    assert all(mount["readOnly"] and mount["name"] in volumes for mount in mounts)
    if "components/bundle-in-image" in build:
        assert mounts == []
        assert f" {bundle}\n" in (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    else:
        (mount,) = mounts
        assert bundle.startswith(mount["mountPath"])


def test_memory_is_bounded_and_cores_match_threads(build: Build) -> None:
    resources = container(build)["resources"]
    assert {"cpu", "memory"} <= resources["requests"].keys()
    assert "memory" in resources["limits"]
    if build[0] == "overlays/cpu":
        threads = int(flags(build)["engines"]) * int(flags(build)["threads"])
        assert resources["limits"]["cpu"] == resources["requests"]["cpu"] == str(threads)
        assert flags(build)["device"] == "cpu"
    if build[0] == "overlays/gpu":
        assert resources["limits"]["nvidia.com/gpu"] == "1"
        assert flags(build)["device"] == "cuda"


def test_the_image_is_one_that_the_dockerfile_makes(build: Build) -> None:
    name, _, tag = container(build)["image"].partition(":")
    assert name == "transformer-serving"
    assert build[0] not in OVERLAYS or tag == build[0].removeprefix("overlays/")


def test_the_autoscaler_asks_for_metrics_that_the_adapter_offers(build: Build) -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "adapter.yaml").read_text(encoding="utf-8"))["rules"]
    asked = [metric["pods"]["metric"]["name"] for metric in only(build, "HorizontalPodAutoscaler")["spec"]["metrics"]]
    assert set(asked) == {rule["name"]["as"] for rule in rules}
