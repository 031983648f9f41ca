"""A Dockerfile as stages of instructions; enough to check ours where no container engine is at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    arguments: str


@dataclass(slots=True)
class Stage:
    name: str
    base: str
    """Another stage's name, or an image."""
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [instruction.arguments for instruction in self.instructions if instruction.name == name]


def parse(path: Path) -> dict[str, Stage]:
    """The stages by name, in order; variables declared before the first stage are filled in."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    variables: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in lines:
        name, _, arguments = line.partition(" ")
        arguments = re.sub(r"\$\{(\w+)\}", lambda found: variables.get(found[1], found[0]), arguments.strip())
        if name == "ARG" and current is None:
            variable, _, value = arguments.partition("=")
            variables[variable] = value
        elif name == "FROM":
            base, _, alias = re.sub(r"\s+AS\s+", " AS ", arguments, flags=re.IGNORECASE).partition(" AS ")
            current = stages[alias] = Stage(alias, base)
        else:
            assert current is not None, f"{name} before the first FROM"
            current.instructions.append(Instruction(name, arguments))
    return stages


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """The stage and those it is built on, the outermost first."""
    found = []
    while name in stages:
        found.append(stages[name])
        name = stages[name].base
    return found
