"""How a command ends that promises something: the facts, what was not kept, and an exit code for whoever looks no further."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from tests.load.report import describe_machine


def conclude(facts: Sequence[str], problems: Sequence[str]) -> NoReturn:
    """Exits with 1 if there is any problem."""
    print(describe_machine())
    for fact in facts:
        print(fact)
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print(f"{len(problems)} problems" if problems else "everything held")
    sys.exit(bool(problems))
