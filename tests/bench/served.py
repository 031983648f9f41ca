"""The real server as a process of its own, for as long as a measurement takes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


@contextmanager
def served(bundle: Path, *options: str, seconds: float = 60.0) -> Iterator[str]:
    """Yields the target (host:port) of a server of this bundle that says SERVING.

    Raises:
        RuntimeError: when it does not within ``seconds``.
    """
    port, http_port = _free_port(), _free_port()
    command = [sys.executable, "-m", "server", str(bundle), "--port", str(port), "--http-port", str(http_port), *options]
    process = subprocess.Popen([*command, "--log-level", "warning"])
    try:
        target = f"127.0.0.1:{port}"
        _wait_until_serving(target, process, time.monotonic() + seconds)
        yield target
    finally:
        process.terminate()
        process.wait()


def _wait_until_serving(target: str, process: subprocess.Popen[bytes], deadline: float) -> None:
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if stub.Check(health_pb2.HealthCheckRequest(), timeout=1).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.1)
    raise RuntimeError(f"the server at {target} does not serve")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
