"""What is compared with a peer: points of shape, precision, decoding, clients and lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from tests.bench.contender import Job
from tests.bench.natural import natural_length, source_of
from tests.bench.shapes import LENGTHS, SHAPES


class Shape(StrEnum):
    BASE = "base"
    TINY = "tiny"


class Precision(StrEnum):
    FP32 = "fp32"
    INT8 = "int8"


class Strategy(StrEnum):
    GREEDY = "greedy"
    BEAM4 = "beam4"

    @property
    def beams(self) -> int:
        return 1 if self is Strategy.GREEDY else 4


class Lengths(StrEnum):
    FIXED = "fixed"
    NATURAL = "natural"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is compared."""

    shape: Shape
    precision: Precision
    strategy: Strategy
    concurrency: int
    lengths: Lengths

    def job(self, rounds: int) -> Job:
        """``rounds`` requests of each client; the same for each side."""
        rng, vocab_size = random.Random(0), SHAPES[self.shape].vocab_size
        source_length, target_length = LENGTHS[self.shape]
        natural = self.lengths is Lengths.NATURAL
        sizes = [natural_length(rng) if natural else source_length for _ in range(rounds * self.concurrency)]
        sources = [source_of(rng, size, vocab_size) for size in sizes]
        return Job(
            sources=sources, clients=self.concurrency, beams=self.strategy.beams, length=None if natural else target_length
        )
