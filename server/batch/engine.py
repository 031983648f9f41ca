"""The engine: one loop, ``step()``, over everything that is being generated.

A step lets waiting requests join, runs one decode step for every live row, chooses each row's next token, and lets finished
rows leave. Requests of any kind share the batch: greedy, beam search of any width, sampling, scoring.

The engine reports (events, ``StepStats``) and measures nothing else; it knows neither gRPC nor where its model computes.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np

from server.batch.alignment import Align, Aligner
from server.batch.groups import Group, GroupTable
from server.batch.hypotheses import Hypotheses
from server.batch.kv_cache import Rows, RowTable
from server.batch.next_tokens import NextTokens
from server.batch.sampling import uniform_draws
from server.batch.scheduler import Company, Scheduler, Waiting
from server.batch.sequence_model import Candidates, SequenceModel
from server.batch.step_stats import StepStats
from server.batch.stopping import StoppingText, TextStream
from server.requests import Event, GenerationRequest

P = ParamSpec("P")
T = TypeVar("T")
Addressed = tuple[str, Event]
"""An event and the id of the request it belongs to."""


@dataclass(slots=True)
class _Prefill:
    """The request whose prompt is being prefilled, and how far."""

    waiting: Waiting
    done: int = 0


class Engine:
    """The running batch of one model with a decoder.

    Args:
        start_token, end_token: begin and end of a target.
        join_tokens: input tokens that one step may encode or prefill.
        text_stream: begins the text of an output; needed by requests with stop strings.
        align: finds where the decoder looked; needed by requests that ask for attention or a coverage penalty.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        start_token: int,
        end_token: int,
        join_tokens: int = 512,
        text_stream: Callable[[], TextStream] | None = None,
        align: Align | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.start_token = start_token
        self.text_stream = text_stream
        self.clock = clock
        self.scheduler = Scheduler(join_tokens)
        self._company = Company()
        self.rows = RowTable(model.rows)
        longest = model.shape.longest_target
        self.hypotheses = Hypotheses.empty(model.rows, longest)
        self.groups = GroupTable(model.rows, longest)
        self._prefill: _Prefill | None = None
        self._events: list[Addressed] = []
        self._stats = StepStats()
        self._wasted_tokens = 0
        aligner = Aligner(align, start_token) if align else None
        self._next = NextTokens(model, self.hypotheses, self.groups, end_token, self._emit, aligner)

    @property
    def has_work(self) -> bool:
        return bool(len(self.groups) or len(self.scheduler) or self._prefill)

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request; its events come out of later steps."""
        self.scheduler.add(request, self.clock())

    def cancel(self, request_id: str) -> None:
        """Forgets a request: no further events, its rows free at once. Unknown ids are ignored: it may just have finished."""
        if self.scheduler.remove(request_id):
            return
        if self._prefill and self._prefill.waiting.request.id == request_id:
            self._prefill = None
            return
        group = self.groups.of_request(request_id)
        for one in list(group.family.live) if group else ():
            rows = self._rows_of(one)
            self._wasted_tokens += int(self.hypotheses.length[rows].sum())
            self._leave(rows)
            self.groups.remove(one)

    def step(self) -> tuple[list[Addressed], StepStats]:
        """One iteration; call it while ``has_work``."""
        started = self.clock()
        self._events, self._stats = [], (stats := StepStats())
        self._join(started)
        if self.rows.live:
            written = self._next.tokens_written
            gone = self._next.write(self._decode())
            stats.new_tokens = self._next.tokens_written - written
            if len(gone):
                self._leave(gone)
        stats.live_requests, stats.live_rows, stats.row_capacity = len(self.groups), self.rows.live, self.rows.capacity
        stats.waiting_requests = len(self.scheduler) + (self._prefill is not None)
        stats.waiting_tokens = self.scheduler.waiting_tokens
        stats.wasted_tokens, self._wasted_tokens = self._wasted_tokens, 0
        stats.seconds = self.clock() - started
        return self._events, stats

    # Joining

    def _join(self, now: float) -> None:
        if not (self.scheduler or self._prefill or self._company.anyone):
            return
        joined = self._encode_sources(now) if self.model.shape.has_encoder else self._prefill_prompts()
        self._stats.queue_seconds = tuple(now - waiting.since for waiting in joined)
        self._stats.joined = tuple(waiting.request.id for waiting in joined)

    def _encode_sources(self, now: float) -> list[Waiting]:
        fitting = self.scheduler.fitting(self.rows.free)
        full = sum(len(w.request.input_ids) for w in fitting) >= self.scheduler.join_tokens
        held_up = 0.0 if full else len(self.groups) * self.model.encoding_overhead
        if not self._company.is_complete(len(fitting), now, held_up, self.scheduler.gap(now)):
            return []
        joining = self.scheduler.schedule(self.rows.free)
        if joining:
            rows = [self.rows.join(w.request.decoding.rows) for w in joining]
            sources = [w.request.input_ids for w in joining]
            self._timed(self.model.encode, sources, rows)
            self._stats.encoded_tokens = sum(map(len, sources))
            for waiting, own in zip(joining, rows, strict=True):
                self._start(waiting.request, own, self.start_token, position=0)
        return joining

    def _prefill_prompts(self) -> list[Waiting]:
        """All of a prompt but its last token is prefilled, in chunks; the last one is the first that a decode step feeds."""
        budget, joined = self.scheduler.join_tokens, list[Waiting]()
        while budget > 0:
            if self._prefill is None:
                next_one = self.scheduler.schedule(self.rows.free, budget=1)
                if not next_one:
                    break
                self._prefill = _Prefill(next_one[0])
            request, done = self._prefill.waiting.request, self._prefill.done
            prompt = request.input_ids[:-1]
            chunk = prompt[done : done + budget]
            if chunk:
                self._timed(self.model.prefill, chunk, done)
            self._stats.encoded_tokens += len(chunk)
            self._prefill.done += len(chunk)
            budget -= max(1, len(chunk))
            if self._prefill.done == len(prompt):
                rows = self.rows.join(request.decoding.rows)
                self.model.adopt(rows, len(prompt))
                self._start(request, rows, request.input_ids[-1], position=len(prompt))
                joined.append(self._prefill.waiting)
                self._prefill = None
        return joined

    def _start(self, request: GenerationRequest, rows: Rows, token: int, position: int) -> None:
        groups = self.groups.add(request)
        for group, own in zip(groups, rows.reshape(len(groups), -1), strict=True):
            self._start_group(group, own, token, position)

    def _start_group(self, group: Group, rows: Rows, token: int, position: int) -> None:
        request = group.request
        h = self.hypotheses
        h.next_token[rows], h.position[rows] = token, position
        h.group[rows], h.member[rows] = group.number, np.arange(len(rows))
        h.length[rows], h.total[rows] = 0, 0.0
        if group.is_beam:
            self.groups.place(group, rows)
            h.total[rows[1:]] = -np.inf  # all beams start alike: one of them is enough
        if stops := request.decoding.stop_strings:
            assert self.text_stream is not None
            group.texts = [StoppingText(self.text_stream(), stops, quiet=request.quiet) for _ in rows]
        if sampling := request.decoding.sampling:
            for sample, row in enumerate(rows.tolist()):
                count = request.decoding.max_tokens
                h.draws[row, :count] = uniform_draws(sampling, group.alternative + sample, count)

    # Decoding

    def _decode(self) -> Candidates:
        n, h = self.rows.live, self.hypotheses
        choices = self.model.top_k_choices
        top_k = choices[min(bisect_left(choices, self.groups.most_candidates), len(choices) - 1)]
        self._stats.rows = n
        keep_logits = not self.groups.all_plain
        return self._timed(self.model.decode, h.next_token[:n], h.position[:n], top_k, keep_logits=keep_logits)

    # Leaving

    def _emit(self, request_id: str, event: Event) -> None:
        self._events.append((request_id, event))

    def _rows_of(self, group: Group) -> Rows:
        return np.flatnonzero(self.hypotheses.group[: self.rows.live] == group.number)

    def _leave(self, rows: Rows) -> None:
        moves = self.rows.leave(rows)
        if len(moves.source):
            self.model.move(moves.source, moves.target, int(self.hypotheses.position[moves.source].max()))
            h = self.hypotheses
            h.move(*moves)
            if self.groups.any_beams:
                beams = moves.target[self.groups.is_beam[h.group[moves.target]]]
                self.groups.move(h.group[beams], h.member[beams], beams)

    def _timed(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        started = self.clock()
        result = call(*args, **kwargs)
        self._stats.runtime_seconds += self.clock() - started
        return result
