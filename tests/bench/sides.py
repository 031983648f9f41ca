"""The two sides of ``tests.bench.peers``: our engine, as it serves but without gRPC, and CTranslate2."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock

from model.config import ModelConfig
from model.decode import BOS, EOS
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import SessionSettings
from server.requests import Decoding, Finished, GenerationRequest
from tests.bench.contender import Contender, Job, Outcome, Runner, Settings

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
            tokens = answer(engine, job)
            return Outcome(seconds=time.perf_counter() - started, tokens=tokens)

        return run

    def _open_several(self) -> Runner:
        """Each engine has its clients; ``Contender`` is how one engine runs too."""
        one = replace(self, processes=1, rows=-(-self.rows // self.processes))
        engines = [Contender(one) for _ in range(self.processes)]

        def run(job: Job) -> Outcome:
            used = min(self.processes, job.clients)
            shares = [replace(job, sources=job.sources[i::used], clients=len(range(i, job.clients, used))) for i in range(used)]
            started = time.perf_counter()
            for engine, share in zip(engines, shares, strict=False):
                engine.begin(share)
            tokens = sum(engine.end().tokens for engine, _ in zip(engines, shares, strict=False))
            return Outcome(seconds=time.perf_counter() - started, tokens=tokens)

        return run

    def tunings(self, concurrency: int) -> Iterator[dict[str, int]]:
        """join_tokens: what one step may encode. running_rows: the rows of each engine that may be live at once; requests for
        which there are none wait, as behind ``--max-rows``."""
        for rows in (self.rows, 32, 16) if concurrency > 8 else (self.rows,):
            yield {"join_tokens": 512, "running_rows": rows}
        if concurrency > 8:
            yield {"join_tokens": 8192, "running_rows": self.rows}


def answer(engine: Engine, job: Job) -> int:
    """Every request is answered; returns the number of tokens."""
    at_once = max(1, min(job.clients, job.tuning["running_rows"] // job.beams))
    decoding = Decoding(beams=job.beams, max_tokens=job.length or LONGEST, min_tokens=job.length or 0)
    requests = iter([GenerationRequest(id=str(i), input_ids=tuple(s), decoding=decoding) for i, s in enumerate(job.sources)])
    for request in islice(requests, at_once):
        engine.submit(request)
    tokens = 0
    while engine.has_work:
        events, _ = engine.step()
        for _, event in events:
            if isinstance(event, Finished):
                tokens += len(event.hypotheses[0].tokens)
                for request in islice(requests, 1):
                    engine.submit(request)
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

        def translate(sources: list[list[str]], job: Job) -> int:
            results = translator.translate_batch(
                sources,
                beam_size=job.beams,
                max_batch_size=job.tuning["max_batch_size"],
                min_decoding_length=job.length or 0,
                max_decoding_length=job.length or LONGEST,
                return_end_token=True,
            )
            return sum(len(result.hypotheses[0]) for result in results)

        def run(job: Job) -> Outcome:
            sources = [words(source) for source in job.sources]
            started = time.perf_counter()
            if job.tuning["together"]:
                tokens = sum(translate(sources[i : i + job.clients], job) for i in range(0, len(sources), job.clients))
            else:
                tokens = _translate_in_turn(translate, sources, job, self.workers)
            return Outcome(seconds=time.perf_counter() - started, tokens=tokens)

        return run

    def tunings(self, concurrency: int) -> Iterator[dict[str, int]]:
        """How requests are batched.

        together: all clients' requests are translated in one call, which sorts them by length and cuts them into batches.
        Otherwise a worker takes the next batch as soon as it is free, of whoever waits.
        max_batch_size: each worker's share in one batch, in two, or in four.
        """
        share = -(-concurrency // self.workers)
        for size in sorted({max(share // parts, min(share, 4)) for parts in (1, 2, 4)}, reverse=True):
            yield {"max_batch_size": size, "together": 1}
            if concurrency > 1:
                yield {"max_batch_size": size, "together": 0}


def _translate_in_turn(
    translate: Callable[[list[list[str]], Job], int], sources: list[list[str]], job: Job, workers: int
) -> int:
    """A thread for each worker, which translates whatever is there, up to a batch; returns the number of tokens."""
    unsent = deque(sources)
    waiting = deque(unsent.popleft() for _ in range(min(job.clients, len(unsent))))
    lock = Lock()

    def work() -> int:
        tokens, answered = 0, 0
        while True:
            with lock:
                waiting.extend(unsent.popleft() for _ in range(min(answered, len(unsent))))
                batch = [waiting.popleft() for _ in range(min(job.tuning["max_batch_size"], len(waiting)))]
            if not batch:
                return tokens
            tokens, answered = tokens + translate(batch, job), len(batch)

    with ThreadPoolExecutor(workers) as pool:
        return sum(f.result() for f in [pool.submit(work) for _ in range(workers)])
