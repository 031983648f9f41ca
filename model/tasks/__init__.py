"""Tasks that make their own data: no file, no licence, no end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from model.tasks import dates

PairMaker = Callable[[int, int], Iterator[tuple[str, str]]]
"""(seed, count) -> that many (source, target) pairs, the same ones for the same seed."""

TRAINING_PAIRS: dict[str, PairMaker] = {"dates": dates.training_pairs}
HELD_OUT_PAIRS: dict[str, PairMaker] = {"dates": dates.held_out_pairs}
"""Pairs that no call of the task's training maker ever returns, each with a single right answer."""
