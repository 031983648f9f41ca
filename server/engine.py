"""The engine: one loop, ``step()``, over everything that is being generated.

A step lets waiting requests join, runs one decode step for every live row, chooses each row's next token, and lets finished
rows leave. Requests of any kind share the batch: greedy, beam search of any width, sampling, scoring.

The engine reports (events, ``StepStats``) and measures nothing else; it knows neither gRPC nor where its model computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from server.beam import agreed_length, beam_step
from server.groups import Group, GroupTable
from server.hypotheses import Hypotheses
from server.kv_cache import Rows, RowTable
from server.requests import Event, Failed, Failure, Finished, FinishReason, GenerationRequest, TokensReady
from server.sampling import draw, forbid, most_probable, uniform_draws
from server.scheduler import Scheduler, Waiting
from server.sequence_model import Candidates, SequenceModel
from server.step_stats import StepStats

P = ParamSpec("P")
T = TypeVar("T")
Addressed = tuple[str, Event]
"""An event and the id of the request it belongs to."""


@dataclass(slots=True)
class _Prefill:
    """The request whose prompt is being prefilled, and how far."""

    waiting: Waiting
    done: int = 0


@dataclass(slots=True)
class _StepWork:
    """What one step did, for StepStats."""

    runtime_seconds: float = 0.0
    rows: int = 0
    new_tokens: int = 0
    encoded_requests: int = 0
    encoded_tokens: int = 0
    queue_seconds: tuple[float, ...] = ()


class Engine:
    """The running batch of one model with a decoder.

    Args:
        start_token, end_token: begin and end of a target.
        join_tokens: input tokens that one step may encode or prefill.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        start_token: int,
        end_token: int,
        join_tokens: int = 512,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.start_token, self.end_token = start_token, end_token
        self.clock = clock
        self.scheduler = Scheduler(join_tokens)
        self.rows = RowTable(model.rows)
        longest = model.shape.longest_target
        self.hypotheses = Hypotheses.empty(model.rows, longest)
        self.groups = GroupTable(model.rows, longest)
        self._prefill: _Prefill | None = None
        self._events: list[Addressed] = []
        self._work = _StepWork()

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
        if group is not None:
            self._leave(self._rows_of(group))
            self.groups.remove(group)

    def step(self) -> tuple[list[Addressed], StepStats]:
        """One iteration; call it while ``has_work``."""
        started = self.clock()
        self._events, self._work = [], _StepWork()
        self._join(started)
        if self.rows.live:
            self._advance(self._decode())
        work = self._work
        return self._events, StepStats(
            seconds=self.clock() - started,
            runtime_seconds=work.runtime_seconds,
            rows=work.rows,
            new_tokens=work.new_tokens,
            encoded_requests=work.encoded_requests,
            encoded_tokens=work.encoded_tokens,
            live_requests=len(self.groups),
            live_rows=self.rows.live,
            row_capacity=self.rows.capacity,
            waiting_requests=len(self.scheduler) + (self._prefill is not None),
            waiting_tokens=self.scheduler.waiting_tokens,
            queue_seconds=work.queue_seconds,
        )

    # Joining

    def _join(self, now: float) -> None:
        joined = self._encode_sources() if self.model.shape.has_encoder else self._prefill_prompts()
        self._work.queue_seconds = tuple(now - waiting.since for waiting in joined)
        self._work.encoded_requests = len(joined)

    def _encode_sources(self) -> list[Waiting]:
        joining = self.scheduler.schedule(self.rows.free)
        if joining:
            rows = [self.rows.join(w.request.decoding.rows) for w in joining]
            sources = [w.request.input_ids for w in joining]
            self._timed(self.model.encode, sources, rows)
            self._work.encoded_tokens = sum(map(len, sources))
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
            self._work.encoded_tokens += len(chunk)
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
        group = self.groups.add(request)
        h = self.hypotheses
        h.next_token[rows], h.position[rows] = token, position
        h.group[rows], h.member[rows] = group.number, np.arange(len(rows))
        h.length[rows], h.total[rows] = 0, 0.0
        if group.is_beam:
            h.total[rows[1:]] = -np.inf  # all beams start alike: one of them is enough
        if sampling := request.decoding.sampling:
            for sample, row in enumerate(rows.tolist()):
                count = request.decoding.max_tokens
                h.draws[row, :count] = uniform_draws(sampling, sample, count)

    # Decoding

    def _decode(self) -> Candidates:
        n, h = self.rows.live, self.hypotheses
        wanted = max(group.candidates() for group in self.groups)
        choices = self.model.top_k_choices
        top_k = next((k for k in choices if k >= wanted), choices[-1])
        self._work.rows = n
        return self._timed(self.model.decode, h.next_token[:n], h.position[:n], top_k)

    def _advance(self, candidates: Candidates) -> None:
        """Chooses the next token of every live row."""
        n, h, groups = self.rows.live, self.hypotheses, self.groups
        ids, log_p = candidates
        group, length = h.group[:n], h.length[:n]
        top = log_p[:, 0]  # before anything is forbidden: what the logits are compared with
        broken = ~np.isfinite(top)
        leaving = [self._fail_broken(broken)] if broken.any() else []
        too_short = length < groups.min_tokens[group]
        if too_short.any():
            log_p = forbid(ids, log_p, self.end_token, too_short)
        forced = length < groups.forced_length[group]
        beam = groups.is_beam[group] & ~forced & ~broken
        single = ~beam & ~broken
        if single.any():
            leaving.append(self._advance_single(np.flatnonzero(single), ids, log_p, top, forced))
        if beam.any():
            leaving.append(self._advance_beams(np.flatnonzero(beam), ids, log_p))
        gone = np.concatenate(leaving) if leaving else np.empty(0, np.intp)
        if len(gone):
            self._leave(gone)

    def _advance_single(
        self,
        rows: Rows,
        ids: NDArray[np.int64],
        log_p: NDArray[np.float32],
        top: NDArray[np.float32],
        forced: NDArray[np.bool_],
    ) -> Rows:
        """Greedy, sampled and forced rows: each writes one token. Returns the rows that ended."""
        h, groups = self.hypotheses, self.groups
        column = most_probable(ids, log_p)
        tokens = np.take_along_axis(ids, column[:, None], axis=1)[:, 0]
        scores = np.take_along_axis(log_p, column[:, None], axis=1)[:, 0]
        sampled = rows[groups.is_sampled[h.group[rows]] & ~forced[rows]]
        if len(sampled):
            tokens[sampled], scores[sampled] = self._sample(sampled, ids, log_p, top)
        pushed = rows[forced[rows]]
        if len(pushed):
            tokens[pushed] = groups.forced[h.group[pushed], h.length[pushed]]
            logits = self.model.logits(pushed)
            at = np.arange(len(pushed))
            # The best token's logit and log-probability differ by the same constant as any other's.
            scores[pushed] = logits[at, tokens[pushed]] - logits[at, ids[pushed, 0]] + top[pushed]
        h.append(rows, tokens[rows], scores[rows])
        self._work.new_tokens += len(rows)
        own = h.group[rows]
        ended = (tokens[rows] == self.end_token) & ~forced[rows]
        ended |= (h.length[rows] >= groups.max_tokens[own]) & ~groups.is_beam[own]
        ended |= groups.forced_only[own] & (h.length[rows] == groups.forced_length[own])
        for row in rows[groups.streams[own] & ~groups.is_beam[own]].tolist():
            last = h.length[row] - 1
            ready = TokensReady(int(h.member[row]), (int(h.tokens[row, last]),), (float(h.log_probabilities[row, last]),))
            self._events.append((groups[int(h.group[row])].request.id, ready))
        gone = rows[ended]
        for row in gone.tolist():
            group = groups[int(h.group[row])]
            written, log_probabilities = h.written(row)
            reason = FinishReason.END_OF_TEXT if written[-1] == self.end_token else FinishReason.LENGTH
            group.finished[int(h.member[row])] = group.hypothesis(written, log_probabilities, reason)
            group.live_rows -= 1
            if group.live_rows == 0:
                self._finish(group)
        return gone

    def _sample(
        self, rows: Rows, ids: NDArray[np.int64], log_p: NDArray[np.float32], top: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Tokens and log-probabilities drawn for ``rows``."""
        h, groups = self.hypotheses, self.groups
        tokens, scores = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        whole = groups.needs_all_logits[h.group[rows]]
        for part in (np.flatnonzero(~whole), np.flatnonzero(whole)):
            if not len(part):
                continue
            own = rows[part]
            group = h.group[own]
            part_ids, part_log_p = ids[own], log_p[own]
            if whole[part[0]]:
                part_ids, part_log_p = self._all_candidates(own, ids, top)
            column = draw(
                part_log_p, h.draws[own, h.length[own]], groups.temperature[group], groups.top_k[group], groups.top_p[group]
            )[:, None]
            tokens[part] = np.take_along_axis(part_ids, column, axis=1)[:, 0]
            scores[part] = np.take_along_axis(part_log_p, column, axis=1)[:, 0]
        return tokens, scores

    def _all_candidates(
        self, rows: Rows, ids: NDArray[np.int64], top: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The whole vocabulary of each row, best first."""
        h = self.hypotheses
        logits = self.model.logits(rows)
        log_p = logits - (logits[np.arange(len(rows)), ids[rows, 0]] - top[rows])[:, None]
        order = np.argsort(-log_p, axis=1, kind="stable")
        log_p = np.take_along_axis(log_p, order, axis=1)
        too_short = h.length[rows] < self.groups.min_tokens[h.group[rows]]
        return order, forbid(order, log_p, self.end_token, too_short)

    def _advance_beams(self, rows: Rows, ids: NDArray[np.int64], log_p: NDArray[np.float32]) -> Rows:
        """One step of every beam search. Returns the rows of the requests that ended."""
        h, groups = self.hypotheses, self.groups
        rows = rows[np.lexsort((h.member[rows], h.group[rows]))]
        numbers, index = np.unique(h.group[rows], return_inverse=True)
        table = np.full((len(numbers), int(h.member[rows].max()) + 1), -1)
        table[index, h.member[rows]] = rows
        step = beam_step(table, h.total[table], ids[table], log_p[table], self.end_token)
        for source, score in zip(step.ended_source.tolist(), step.ended_log_probability.tolist(), strict=True):
            group = groups[int(h.group[source])]
            tokens, scores = h.written(source)
            group.finished[len(group.finished)] = group.hypothesis(
                (*tokens, self.end_token), (*scores, score), FinishReason.END_OF_TEXT
            )
        moved = step.survivor_source != step.survivor_target
        source, target = step.survivor_source[moved], step.survivor_target[moved]
        if len(source):
            self.model.branch(source, target, int(h.position[source].max()) + 1)
            h.branch(source, target)
        h.total[step.empty] = -np.inf
        h.append(step.survivor_target, step.survivor_token, step.survivor_log_probability)
        self._work.new_tokens += len(step.survivor_target)

        present = table >= 0
        at_limit = h.length[table].max(axis=1, initial=0, where=present) >= groups.max_tokens[numbers]
        empty = ~((h.total[table] > -np.inf) & present).any(axis=1)
        just_ended = np.isin(numbers, h.group[step.ended_source])
        gone = []
        for i in np.flatnonzero(at_limit | empty | just_ended | groups.streams[numbers]).tolist():
            group, own = groups[int(numbers[i])], table[i][present[i]]
            live = own[h.total[own] > -np.inf]
            if at_limit[i] and not group.enough:
                for row in live.tolist():
                    tokens, scores = h.written(row)
                    group.finished[len(group.finished)] = group.hypothesis(tokens, scores, FinishReason.LENGTH)
            if group.enough or at_limit[i] or empty[i]:
                self._finish(group)
                gone.append(own)
            elif group.request.stream:
                self._send_agreed(group, live)
        return np.concatenate(gone) if gone else np.empty(0, np.intp)

    def _send_agreed(self, group: Group, live: Rows) -> None:
        """Reports the tokens on which every hypothesis that may still win agrees: the live ones and the best finished one."""
        h = self.hypotheses
        contenders = h.tokens[live, : h.length[live[0]]]
        agreed = agreed_length(contenders, group.sent)
        if group.finished:
            best = max(group.finished.values(), key=lambda f: f.score).tokens
            while agreed > group.sent and tuple(contenders[0, group.sent : agreed]) != best[group.sent : agreed]:
                agreed -= 1
        if agreed > group.sent:
            tokens = tuple(contenders[0, group.sent : agreed].tolist())
            scores = tuple(h.log_probabilities[live[0], group.sent : agreed].tolist())
            self._events.append((group.request.id, TokensReady(0, tokens, scores)))
            group.sent = agreed

    # Leaving

    def _finish(self, group: Group) -> None:
        results = group.results()
        if group.request.stream and group.is_beam and group.sent < len(results[0].tokens):
            rest = slice(group.sent, None)
            ready = TokensReady(0, results[0].tokens[rest], results[0].log_probabilities[rest])
            self._events.append((group.request.id, ready))
        self._events.append((group.request.id, Finished(results)))
        self.groups.remove(group)

    def _fail_broken(self, broken: NDArray[np.bool_]) -> Rows:
        """Rows whose scores are not numbers fail alone, with their request; their neighbours go on."""
        h = self.hypotheses
        gone = []
        for number in np.unique(h.group[np.flatnonzero(broken)]).tolist():
            group = self.groups[number]
            gone.append(self._rows_of(group))
            self._events.append(
                (group.request.id, Failed(Failure.NUMERICS, "the model's scores are not finite for this input"))
            )
            self.groups.remove(group)
        rows = np.concatenate(gone)
        broken[rows] = True  # the group's sound rows go with it
        return rows

    def _rows_of(self, group: Group) -> Rows:
        return np.flatnonzero(self.hypotheses.group[: self.rows.live] == group.number)

    def _leave(self, rows: Rows) -> None:
        moves = self.rows.leave(rows)
        if len(moves.source):
            self.model.move(moves.source, moves.target, int(self.hypotheses.position[moves.source].max()))
            self.hypotheses.move(*moves)

    def _timed(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        started = self.clock()
        result = call(*args, **kwargs)
        self._work.runtime_seconds += self.clock() - started
        return result
