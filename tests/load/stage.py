"""Runs one plan in a generator process and reads back what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .ledger import Record
from .plan import Plan

ROOT = Path(__file__).resolve().parents[2]
START_UP_SECONDS = 60.0


class StageError(RuntimeError):
    """The stage could not be run; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    records: list[Record]
    cpu_seconds: float
    model: str
    """The model that answered, as the server describes it."""


def run_stage(plan: Plan) -> Outcome:
    """Raises StageError when the server cannot be reached, can never answer, or the generator does not end in its time."""
    limit = START_UP_SECONDS + plan.seconds + plan.deadline * (1 + plan.warmup)
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "tests.load.generator"],
            input=plan.to_json() + "\n",
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StageError(f"the generator did not end within {limit:.0f} s and was killed") from error
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    if lines and "hopeless" in lines[-1]:
        raise StageError(lines[-1]["hopeless"])
    if ran.returncode or not lines:
        raise StageError(f"the generator ended with exit code {ran.returncode}")
    *records, facts = lines
    return Outcome(records=[_record(fields) for fields in records], **facts)


def _record(fields: dict[str, object]) -> Record:
    gaps = fields.pop("gaps")
    assert isinstance(gaps, list)
    return Record(**fields, gaps=tuple(gaps))  # type: ignore[arg-type]
