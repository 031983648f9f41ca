"""Planting faults, and that the lives notice them."""

from __future__ import annotations

import ast
import textwrap

from tests.simulation.mutants import TESTS, survives
from tests.simulation.mutation import mutants
from tests.simulation.planting import ROOT, mutants_of

SOURCE = textwrap.dedent(
    '''
    LIMIT = 3

    def admit(waiting: int = 4) -> bool:
        """Says 5."""
        if waiting < LIMIT and not full:
            count.value += 1
            return True
        raise Refused
    '''
)


def test_every_slip_is_made_once_and_none_where_nothing_runs() -> None:
    assert [(one.line, one.change) for one in mutants(SOURCE)] == [
        (6, "waiting < LIMIT and (not full) -> not"),
        (6, "waiting < LIMIT and (not full) -> waiting < LIMIT or not full"),
        (6, "not full -> full"),
        (6, "waiting < LIMIT -> waiting <= LIMIT"),
        (6, "waiting < LIMIT -> waiting >= LIMIT"),
        (7, "count.value += 1 -> count.value -= 1"),
        (7, "count.value += 1 -> nothing"),
        (7, "1 -> 2"),
        (8, "return True -> nothing"),
        (8, "True -> False"),
        (9, "raise Refused -> nothing"),
    ]
    sources = {one.source for one in mutants(SOURCE)}
    assert len(sources) == 11
    assert ast.unparse(ast.parse(SOURCE)) not in sources


def test_what_is_mutated_exists_and_so_do_its_tests() -> None:
    for module, files in TESTS.items():
        assert mutants_of(module)
        assert all((ROOT / f"tests/server/{name}.py").exists() for name in files)


def test_lives_go_well_without_a_fault_and_notice_one() -> None:
    assert survives("", "", lives=4) == ""
    (planted,) = [one for one in mutants_of("server.batch.scheduler") if one.change == "free_rows -= rows -> nothing"]
    assert survives("server.batch.scheduler", planted.source, lives=20)
