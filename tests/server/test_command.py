"""``python -m server`` as an operator sees it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.client import SyncTransformerClient


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_missing_bundle_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'none'}: not a bundle (no such directory)\n"


def test_impossible_options_are_named_all_at_once(tmp_path: Path) -> None:
    done = run(str(tmp_path), "--port", "70000", "--drain-seconds", "-1")
    assert done.returncode == 2
    assert done.stderr == "error: drain_seconds must be at least 0, not -1.0; port must be at most 65535, not 70000\n"


def test_unknown_flags_are_refused_by_name() -> None:
    done = run("bundle", "--max-row", "4")
    assert done.returncode == 2
    assert "--max-row" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_gently_on_a_signal(bundles: dict[str, Path], number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "server",
        str(bundles["encoder_decoder"]),
        "--port",
        "0",
        "--http-port",
        "0",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        entries = []
        for line in process.stderr:
            entries.append(json.loads(line))
            if entries[-1]["message"] == "serving":
                break
        port = next(entry["port"] for entry in entries if "port" in entry)
        with SyncTransformerClient(f"127.0.0.1:{port}", timeout=10) as client:
            assert client.generate(["abc"])
        process.send_signal(number)
        rest = [json.loads(line)["message"] for line in process.stderr]
    assert process.returncode == 0
    assert rest == ["not serving", "stopped"]
