"""The two sides of ``tests.bench.peers``: our engine, as it serves but without gRPC, and CTranslate2."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from model.config import ModelConfig
from model.decode import BOS, EOS
from server.engine import Engine
from server.requests import Decoding, Finished, GenerationRequest
from server.runtime import SequenceRuntime, SessionSettings
from server.sequence_model import SequenceShape
from tests.bench.contender import Contender, Job, Outcome, Runner, Settings, Wave

LONGEST = 64
"""Tokens after which a text is cut off where its length is its own; none is as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSide:
    """Our engine.

    Args:
        rows: row capacity of all processes together.
        processes: engines side by side, each in its own process, with every so-manieth request.
        threads: of each process's session.
    """

    graphs: Path
    config: ModelConfig
    rows: int
    processes: int
    threads: int
    spinning: bool

    @property
    def environment(self) -> dict[str, str]:
        return {}

    @property
    def settings(self) -> Settings:
        return {"processes": self.processes, "threads": self.threads, "spinning": self.spinning}

    def open(self) -> Runner:
        if self.processes > 1:
            return self._open_several()
        settings = SessionSettings(threads=self.threads, spinning=self.spinning)
        runtime = SequenceRuntime(self.graphs, SequenceShape.from_config(self.config.to_dict()), self.rows, settings)
        runtime.tune()

        def run(job: Job) -> Outcome:
            engine = Engine(runtime, start_token=BOS, end_token=EOS, join_tokens=job.tuning["join_tokens"])
            started = time.perf_counter()
            tokens = sum(_drain(engine, wave, job) for wave in job.waves)
            return Outcome(seconds=time.perf_counter() - started, tokens=tokens)

        return run

    def _open_several(self) -> Runner:
        """A wave ends when its last part ends, as for CTranslate2; ``Contender`` is how one engine runs too."""
        one = replace(self, processes=1, rows=-(-self.rows // self.processes))
        engines = [Contender(one) for _ in range(self.processes)]

        def run(job: Job) -> Outcome:
            waves = [[replace(job, waves=[wave[i :: self.processes]]) for i in range(self.processes)] for wave in job.waves]
            started, tokens = time.perf_counter(), 0
            for parts in waves:
                busy = [(engine, part) for engine, part in zip(engines, parts, strict=True) if part.waves[0]]
                for engine, part in busy:
                    engine.begin(part)
                tokens += sum(engine.end().tokens for engine, _ in busy)
            return Outcome(seconds=time.perf_counter() - started, tokens=tokens)

        return run

    def tunings(self, concurrency: int) -> Iterator[dict[str, int]]:
        """join_tokens: what one step may encode."""
        yield {"join_tokens": 512}
        if concurrency > 8:
            yield {"join_tokens": 8192}


def _drain(engine: Engine, wave: Wave, job: Job) -> int:
    """Everything asked for is generated; returns the number of tokens."""
    decoding = Decoding(beams=job.beams, max_tokens=job.length or LONGEST, min_tokens=job.length or 0)
    for i, source in enumerate(wave):
        engine.submit(GenerationRequest(id=str(i), input_ids=tuple(source), decoding=decoding))
    tokens = 0
    while engine.has_work:
        events, _ = engine.step()
        tokens += sum(len(event.hypotheses[0].tokens) for _, event in events if isinstance(event, Finished))
    return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class CTranslate2Side:
    """CTranslate2.

    Args:
        workers: batches translated at the same time (``inter_threads``).
        threads: of each worker (``intra_threads``).
        mkl: whether matrix products may use MKL rather than oneDNN.
    """

    folder: Path
    workers: int
    threads: int
    mkl: bool

    @property
    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "CT2_USE_MKL": str(int(self.mkl))}

    @property
    def settings(self) -> Settings:
        return {"inter_threads": self.workers, "intra_threads": self.threads, "mkl": self.mkl}

    def open(self) -> Runner:
        import ctranslate2

        from tests.bench.ctranslate2_peer import words

        translator = ctranslate2.Translator(str(self.folder), inter_threads=self.workers, intra_threads=self.threads)

        def run(job: Job) -> Outcome:
            waves = [[words(source) for source in wave] for wave in job.waves]
            started, tokens = time.perf_counter(), 0
            for wave in waves:
                results = translator.translate_batch(
                    wave,
                    beam_size=job.beams,
                    max_batch_size=job.tuning["max_batch_size"],
                    min_decoding_length=job.length or 0,
                    max_decoding_length=job.length or LONGEST,
                    return_end_token=True,
                )
                tokens += sum(len(result.hypotheses[0]) for result in results)
            return Outcome(seconds=time.perf_counter() - started, tokens=tokens)

        return run

    def tunings(self, concurrency: int) -> Iterator[dict[str, int]]:
        """max_batch_size: each worker's share in one batch, in two, or in four; sources are sorted by length first."""
        share = -(-concurrency // self.workers)
        for size in sorted({max(share // parts, min(share, 4)) for parts in (1, 2, 4)}, reverse=True):
            yield {"max_batch_size": size}
