"""``python -m tests.simulation.mutants``: plants faults in scheduler and admission, one at a time, and counts who notices.

First the simulation, as many lives as it takes; what it does not notice is tried on the unit tests with ``--tests``. Mutation
libraries run a test suite for each mutant, from the beginning of Python on; a life takes milliseconds, so mutants are lived in
processes that are forked with everything else imported.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkContext
from typing import Annotated

import numpy  # noqa: F401 (so that no process needs to)
import typer

from tests.simulation.mutation import Mutant
from tests.simulation.planting import ROOT, VARIABLE, mutants_of, plant

TESTS: dict[str, tuple[str, ...]] = {
    "server.waiting.admission": ("waiting/test_admission", "waiting/test_forecast", "waiting/test_waiting_room", "test_calls"),
    "server.waiting.waiting_room": (
        "waiting/test_waiting_room",
        "waiting/test_forecast",
        "waiting/test_several_inputs",
        "test_calls",
    ),
    "server.waiting.fair_queue": ("waiting/test_fair_queue", "waiting/test_waiting_room"),
    "server.waiting.service_rate": ("waiting/test_service_rate", "waiting/test_forecast", "waiting/test_waiting_room"),
    "server.waiting.occupancy": ("waiting/test_occupancy", "waiting/test_forecast", "waiting/test_waiting_room"),
    "server.batch.scheduler": ("batch/test_scheduler", "batch/test_engine"),
    "server.engines.stepper": ("engines/test_in_process",),
    "server.engines.in_flight": ("engines/test_in_flight", "engines/test_in_process", "engines/test_remote_engine"),
    "server.batch.kv_cache": ("batch/test_kv_cache", "batch/test_steps", "batch/test_engine"),
    "server.batch.engine": ("batch/test_steps", "batch/test_engine", "batch/test_engine_options", "batch/test_alignment"),
    "server.batch.groups": (
        "batch/test_groups",
        "batch/test_engine",
        "batch/test_engine_options",
        "batch/test_decoding_options",
        "batch/test_constraints",
        "batch/test_stopping",
    ),
}
"""What is mutated, and the unit tests that are about it."""
_CPU_SECONDS = 60
"""Of a mutant that does not end by itself."""
_MEMORY = 4 * 2**30

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Tried:
    module: str
    mutant: Mutant
    caught_by: str
    """Empty for a survivor."""


@app.command()
def main(
    module: Annotated[list[str] | None, typer.Option(help="What is mutated; repeat for several.", show_default="all")] = None,
    lives: Annotated[int, typer.Option(min=1, help="That each mutant must survive.")] = 200,
    processes: Annotated[int, typer.Option(min=1, help="Mutants tried at a time.")] = 2,
    tests: Annotated[bool, typer.Option("--tests", help="Try the simulation's survivors on the unit tests.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Try only one in so many, for a sample.")] = 1,
    first: Annotated[int, typer.Option(min=0, help="The first of each module that is tried, for another sample.")] = 0,
) -> None:
    """Prints every survivor."""
    modules = module or list(TESTS)
    if problem := survives("", "", lives):
        sys.exit(f"the simulation fails without a mutant: {problem}")
    began, tried = time.monotonic(), list[Tried]()
    work = [(name, mutant) for name in modules for mutant in mutants_of(name)[first::every]]
    with ThreadPoolExecutor(processes) as pool:
        for number, one in enumerate(pool.map(partial(_try, lives=lives, tests=tests), work), start=1):
            tried.append(one)
            if not one.caught_by:
                print(f"survived: {one.module} {one.mutant.number}, line {one.mutant.line}: {one.mutant.change}", flush=True)
            if number % 100 == 0:
                print(f"{number} of {len(work)} mutants, {time.monotonic() - began:.0f} s", flush=True)
    for name in modules:
        print(_summary(name, [one for one in tried if one.module == name]))
    print(_summary("all", tried))


def _try(work: tuple[str, Mutant], lives: int, tests: bool) -> Tried:
    module, mutant = work
    if survives(module, mutant.source, lives):
        return Tried(module, mutant, "simulation")
    if tests and not passes_tests(module, mutant.number):
        return Tried(module, mutant, "unit tests")
    return Tried(module, mutant, "")


def survives(module: str, source: str, lives: int) -> str:
    """What was noticed within so many lives with this source in the module's place; empty if nothing."""
    context: ForkContext = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_live, args=(module, source, lives, sender))
    process.start()
    sender.close()
    try:
        noticed: str = receiver.recv()
    except EOFError:
        noticed = "it does not end, or ends its process"
    process.join()
    receiver.close()
    return noticed


def _live(module: str, source: str, lives: int, sender: multiprocessing.connection.Connection) -> None:  # type: ignore[name-defined]
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a broken event loop says at its end
    noticed = ""
    try:
        if module:
            plant(module, source)
        from tests.simulation.world import live

        for seed in range(lives):
            live(seed)
    except BaseException as error:
        noticed = f"{type(error).__name__}: {error}"
    sender.send(noticed)
    sender.close()
    os._exit(0)


def passes_tests(module: str, number: int) -> bool:
    """Whether the unit tests about this module notice nothing either."""
    files = [f"tests/server/{name}.py" for name in TESTS[module]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "tests.simulation.planting", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, VARIABLE: f"{module}:{number}"}
    limit = partial(resource.setrlimit, resource.RLIMIT_CPU, (3 * _CPU_SECONDS, 3 * _CPU_SECONDS))
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, preexec_fn=limit)
    return ran.returncode == 0


def _summary(name: str, tried: Sequence[Tried]) -> str:
    caught = Counter(one.caught_by for one in tried)
    found = len(tried) - caught[""]
    return (
        f"{name}: {len(tried)} mutants, {caught['simulation']} caught by the simulation, {caught['unit tests']} more by unit"
        f" tests, {caught['']} survived: {found / max(1, len(tried)):.1%} caught"
    )


if __name__ == "__main__":
    app(prog_name="python -m tests.simulation.mutants")
