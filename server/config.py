"""How a server is set up: one frozen dataclass a concern, each checking itself and naming every field that is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from server.waiting.admission import AdmissionLimits, Tenant


class Device(StrEnum):
    AUTO = "auto"
    """CUDA where ONNX Runtime has it, otherwise the CPU."""
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class EnginePlace(StrEnum):
    PROCESS = "process"
    """A process of its own for each engine: one that dies or hangs is replaced while the service goes on."""
    IN_PROCESS = "in-process"
    """A thread of the server: nothing to start, nothing that survives a fault."""


class ConfigError(ValueError):
    """Options that cannot be served with. ``problems`` names every offending field, not only the first."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What each model's engine is given."""

    device: Device = Device.AUTO
    precision: Precision = Precision.AUTO
    """Which of a bundle's sets of graphs runs; AUTO takes the fastest that the bundle has for the device."""
    max_rows: int | None = None
    """Most rows of the running batch; None: the engine's own choice for the device."""
    cache_memory: int | None = None
    """Most bytes that each model's caches may take; rows are cut to fit. None: as many as the rows need."""
    threads: int | None = None
    """Threads of each engine inside ONNX Runtime on the CPU; None: one where there are several engines, otherwise one for each
    core but one, which the service needs."""
    place: EnginePlace = EnginePlace.PROCESS
    engines: int | None = None
    """Engines of each model, which share its requests, rows and cache memory. None: on a CPU, as many as keep all cores but one
    busy; on a GPU one."""
    stall_seconds: float = 8.0
    """An engine process that has work and makes no progress for this long is killed and replaced."""

    def __post_init__(self) -> None:
        given = [name for name in ("max_rows", "cache_memory", "threads", "engines") if getattr(self, name) is not None]
        problems = _below(self, dict.fromkeys(given, 1))
        if not self.stall_seconds > 0:
            problems.append(f"stall_seconds must be above 0, not {self.stall_seconds:g}")
        if self.place is EnginePlace.IN_PROCESS and (self.engines or 1) > 1:
            problems.append(f"engines must be 1 in the server's own process, not {self.engines}")
        if problems:
            raise ConfigError(problems)


def parse_tenants(texts: Iterable[str]) -> dict[str, Tenant]:
    """Tenants by name, each written ``NAME[=WEIGHT][:MAX_WAITING[:MAX_ROWS]]``, for example "search=4:200" or "batch=1::8".

    Raises:
        ConfigError: for anything else, and for two of one name.
    """
    tenants: dict[str, Tenant] = {}
    problems = []
    for text in texts:
        match = re.fullmatch(r"([A-Za-z0-9._-]{1,64})(?:=(\d+(?:\.\d+)?))?(?::(\d*)(?::(\d+))?)?", text)
        numbers = [float(number) for number in match.groups()[1:] if number] if match else []
        if match is None or 0 in numbers:
            problems.append(f"a tenant is written NAME[=WEIGHT][:MAX_WAITING[:MAX_ROWS]], with numbers above 0, not {text!r}")
        elif match[1] in tenants:
            problems.append(f"two tenants are named {match[1]!r}")
        else:
            weight, max_waiting, max_rows = match.groups()[1:]
            tenants[match[1]] = Tenant(
                weight=float(weight or 1),
                max_waiting=int(max_waiting) if max_waiting else None,
                max_rows=int(max_rows) if max_rows else None,
            )
    if problems:
        raise ConfigError(problems)
    return tenants


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "800M", "2GiB", "1.5G" (powers of 1,024) or plain digits.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError([f"a size is written like 800M or 2GiB, not {text!r}"])
    return round(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportLimits:
    """Bounds of the HTTP/2 side, and how long connections live."""

    max_request_bytes: int = 8 * 1024 * 1024
    max_concurrent_calls: int = 8192
    """A backstop far behind admission: it refuses probes too, and names no time to come back."""
    max_streams_per_connection: int = 512
    """Calls that are open on one. A client with more to ask waits, or opens another."""
    max_metadata_bytes: int = 8192
    max_connection_age_seconds: float = 300.0
    """Connections are renewed this often (gRPC adds some jitter), so that clients find new replicas."""
    keepalive_seconds: float = 60.0
    """An idle connection is checked this often, so that a caller that vanished is noticed."""
    least_client_ping_seconds: float = 10.0
    """Clients that ping more often are sent away; our own client pings every 30 s."""

    def grpc_options(self, longest_call_seconds: float, *, share_port: bool = False) -> list[tuple[str, int]]:
        """Channel arguments of gRPC's core."""
        return [
            # A second server on the same port is an error, not a silent half of the traffic; front ends of one server share it.
            ("grpc.so_reuseport", int(share_port)),
            ("grpc.max_receive_message_length", self.max_request_bytes),
            ("grpc.max_send_message_length", -1),  # our own results, bounded by the limits of the call
            ("grpc.max_concurrent_streams", self.max_streams_per_connection),
            # Else the core counts a call until it is cleaned away, though its answer has been sent, and refuses those that its
            # client began in its place: of 3,000 calls at once on one connection half ended as UNAVAILABLE.
            ("grpc.http.overload_protection", 0),
            # Else the core cancels calls at random when more than 1,000 wait for the event loop, those of innocent callers too.
            # On a slow machine floods on eight connections at a time were more than max_concurrent_calls.
            ("grpc.server.max_pending_requests", 2 * self.max_concurrent_calls),
            ("grpc.server.max_pending_requests_hard_limit", 4 * self.max_concurrent_calls),
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", 2 * self.max_metadata_bytes),
            ("grpc.keepalive_time_ms", _milliseconds(self.keepalive_seconds)),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", _milliseconds(self.least_client_ping_seconds)),
            ("grpc.max_connection_age_ms", _milliseconds(self.max_connection_age_seconds)),
            ("grpc.max_connection_age_grace_ms", _milliseconds(longest_call_seconds + 10)),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Everything about a server that is not its models.

    Raises:
        ConfigError: for impossible values, all of them at once, each by its field's name.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    """Of gRPC; 0 takes a free one."""
    http_port: int = 8080
    """Of /metrics; 0 takes a free one."""
    front_ends: int = 1
    """Processes that take calls. One: the server itself, which owns the engines too. Several share the port, and the server
    owns the engines and the queue alone."""
    reflection: bool = False
    default_call_seconds: float = 60.0
    """The deadline of a call that brings none, if it is not above the longest."""
    longest_call_seconds: float = 600.0
    """The cap on the deadline of a call that brings one."""
    write_timeout_seconds: float = 30.0
    """A stream that is not read for this long is ended."""
    drain_seconds: float = 30.0
    """How long calls in flight may go on after the server was asked to stop."""
    notice_seconds: float = 1.0
    """How long new calls are still taken after health has turned NOT_SERVING, so that clients can turn away first."""
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    transport: TransportLimits = field(default_factory=TransportLimits)

    def __post_init__(self) -> None:
        problems = _below(self, {"front_ends": 1, "port": 0, "http_port": 0, "drain_seconds": 0, "notice_seconds": 0})
        problems += [
            f"{name} must be at most 65535, not {getattr(self, name)}"
            for name in ("port", "http_port")
            if getattr(self, name) > 65535
        ]
        problems += _below(self.admission, {"max_waiting_requests": 1, "max_waiting_tokens": 1})
        problems += [
            f"{name} must be above 0, not {getattr(self, name):g}"
            for name in ("default_call_seconds", "longest_call_seconds", "write_timeout_seconds")
            if not getattr(self, name) > 0
        ]
        if not self.host:
            problems.append("host must not be empty")
        if self.port == self.http_port != 0:
            problems.append(f"port and http_port must differ, both are {self.port}")
        if problems:
            raise ConfigError(problems)

    def address(self, port: int) -> str:
        """``host:port`` as gRPC writes it."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


def _below(options: object, least: dict[str, int]) -> list[str]:
    return [
        f"{name} must be at least {low}, not {getattr(options, name)}"
        for name, low in least.items()
        if not getattr(options, name) >= low
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
