"""Has a module imported from a mutant's source. As a pytest plugin, with ``-p``, from that of the one that PLANTED names."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests.simulation.mutation import Mutant, mutants

VARIABLE = "PLANTED"
"""Of the environment: module:number."""
ROOT = Path(__file__).parents[2]


class Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module only, and runs this source in its place."""

    def __init__(self, module: str, source: str) -> None:
        self._module, self._source = module, source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=f"a mutant of {fullname}")

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, f"<a mutant of {self._module}>", "exec"), module.__dict__)


def plant(module: str, source: str) -> None:
    """Before the module is imported for the first time."""
    assert module not in sys.modules, f"{module} is imported already"
    sys.meta_path.insert(0, Planted(module, source))


def mutants_of(module: str) -> list[Mutant]:
    return list(mutants(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")))


if VARIABLE in os.environ:
    _module, _, _number = os.environ[VARIABLE].partition(":")
    plant(_module, mutants_of(_module)[int(_number)].source)
