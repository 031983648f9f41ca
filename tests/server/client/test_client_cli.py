"""``python -m server.client`` as someone at a terminal sees it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from typer.testing import CliRunner, Result

from server.client.__main__ import app
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import Running, encoder, run_server, served_model


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with run_server(served_model(FakeEngine()), encoder(FakeEngine())) as running:
        yield running


async def run(running: Running, *arguments: str, model: str = "dates") -> Result:
    return await asyncio.to_thread(
        CliRunner().invoke, app, ["--target", running.target, "--timeout", "5", "--model", model, *arguments]
    )


async def test_generate_prints_the_text_and_nothing_else(running: Running) -> None:
    assert (await run(running, "generate", "3. mai 2026")).output == "3. mai 2026\n"
    assert (await run(running, "generate", "one", "two")).output == "one\ntwo\n"


async def test_generate_prints_hypotheses_with_their_probabilities(running: Running) -> None:
    result = await run(running, "generate", "--beams", "4", "--hypotheses", "3", "abc")
    assert result.output == "0.1353  abc\n0.2231  bc\n0.3679  c\n"


async def test_generate_can_sample_and_tell_everything(running: Running) -> None:
    result = await run(running, "generate", "--seed", "7", "--temperature", "0.5", "--json", "ab")
    told = json.loads(result.output)
    assert (told["seed"], told["hypotheses"][0]["text"], len(told["hypotheses"][0]["tokens"])) == (7, "ab", 3)


async def test_stream_prints_as_it_comes(running: Running) -> None:
    assert (await run(running, "stream", "3. mai")).output == "3. mai\n"
    events = [json.loads(line) for line in (await run(running, "stream", "--json", "ab")).output.splitlines()]
    assert [event.get("text") for event in events] == ["a", "b", "", None]


@pytest.mark.parametrize(
    ("arguments", "model", "expected"),
    [
        (["classify", "abc"], "mood", "0.7500  good\n0.2500  bad\n"),
        (["embed", "--normalize", "abc"], "mood", "0.6 0.8\n"),
        (["score", "ab", "cd"], "dates", "-1.5000  3 tokens\n"),
        (["health"], "dates", "SERVING\n"),
    ],
)
async def test_other_commands(running: Running, arguments: list[str], model: str, expected: str) -> None:
    result = await run(running, *arguments, model=model)
    assert (result.output, result.exit_code) == (expected, 0)


async def test_tokenize_lines_ids_up_with_pieces(running: Running) -> None:
    lines = (await run(running, "tokenize", "ab")).output.splitlines()
    assert [line.split() for line in lines][-1] == ["2", "</s>"]
    assert {line.index(line.split()[1]) for line in lines} == {4}


async def test_models_tells_names_limits_and_labels(running: Running) -> None:
    output = (await run(running, "models")).output
    for fact in ("dates", "fp32 on cpu", "1,234", "8 inputs of 40 tokens", "bad, good"):
        assert fact in output
    assert [json.loads(line)["name"] for line in (await run(running, "models", "--json")).output.splitlines()] == [
        "dates",
        "mood",
    ]


async def test_a_callers_mistake_is_one_line_and_exit_code_2(running: Running) -> None:
    result = await run(running, "generate", " ")
    assert (result.stderr, result.stdout) == ("error: INVALID_ARGUMENT: inputs[0].text: must not be empty or blank\n", "")
    assert result.exit_code == 2
    assert (await run(running, "generate", "a", model="nope")).exit_code == 2


async def test_a_failing_service_is_one_line_and_exit_code_1() -> None:
    result = await asyncio.to_thread(CliRunner().invoke, app, ["--target", "127.0.0.1:1", "--timeout", "2", "generate", "a"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: UNAVAILABLE: ")
    assert result.stderr.count("\n") == 1


async def test_health_of_a_server_that_is_not_serving() -> None:
    dead = FakeEngine()
    async with run_server(served_model(dead)) as running:
        dead.alive = False
        while running.server.serving:
            await asyncio.sleep(0.02)
        result = await run(running, "health")
    assert (result.output, result.exit_code) == ("NOT_SERVING\n", 1)


@pytest.mark.parametrize("arguments", [["generate", "--beam", "4", "a"], ["generat", "a"], ["--targets", "x", "models"]])
async def test_unknown_words_are_refused_by_name(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert next(word for word in arguments if word in ("--beam", "generat", "--targets")) in result.stderr


async def test_it_runs_as_a_module(running: Running) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "server.client", "--target", running.target, "--model", "dates", "generate", "3. mai"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("3. mai\n", "", 0)
