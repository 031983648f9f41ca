"""What every live row writes next, in one pass over all rows: greedy, forced, sampled and beam-searched alike.

Shapes: B live rows, W candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from server.batch.adjusted import AdjustedRows
from server.batch.alignment import Aligner
from server.batch.beam import Beams, agreed_length, beam_step
from server.batch.groups import Group, GroupTable
from server.batch.hypotheses import Hypotheses
from server.batch.kv_cache import Rows
from server.batch.progress import Progress
from server.batch.sampling import draw, forbid, most_probable, nth_possible
from server.batch.sequence_model import Candidates, SequenceModel
from server.requests import Attention, Event, Failed, Failure, Finished, FinishReason, Hypothesis, TokensReady


class NextTokens:
    """Turns the model's candidates into written tokens, events, and rows that have ended.

    Args:
        emit: told (request id, event), in order.
        aligner: for requests that ask where the decoder looked.
    """

    def __init__(
        self,
        model: SequenceModel,
        hypotheses: Hypotheses,
        groups: GroupTable,
        end_token: int,
        emit: Callable[[str, Event], None],
        aligner: Aligner | None = None,
    ) -> None:
        self.model, self.hypotheses, self.groups = model, hypotheses, groups
        self.end_token, self.emit, self._aligner = end_token, emit, aligner
        self._adjusted = AdjustedRows(model, hypotheses, groups, end_token)
        self._progress = Progress(hypotheses, groups)
        self._every_row = np.arange(len(hypotheses.group))
        self.tokens_written = 0
        """Since the beginning."""

    def write(self, candidates: Candidates) -> Rows:
        """Every live row writes its next token. Returns the rows that ended; their requests' events are emitted."""
        h, groups = self.hypotheses, self.groups
        ids, log_p = candidates
        top = log_p[:, 0]  # before anything is forbidden: what the logits are compared with
        # The usual cases. A sum is finite only where every number is; one call tells what would take two.
        if groups.all_plain and math.isfinite(top.sum()):
            if not groups.any_beams:
                return self._write_greedy(ids, log_p)
            if not groups.any_greedy:
                return self._write_beams(groups.all_beams, ids, self._without_early_ends(ids, log_p))
        n = len(ids)
        group, length = h.group[:n], h.length[:n]
        log_p = self._without_early_ends(ids, log_p)
        broken = ~np.isfinite(top)
        leaving = [self._fail_broken(broken)] if broken.any() else []
        forced = length < groups.forced_length[group]
        if groups.adjusted:
            adjusted = np.flatnonzero(groups.is_adjusted[group] & ~forced & ~broken)
            if len(adjusted):
                ids, log_p = self._adjusted.read(adjusted, Candidates(ids, log_p), top)
        choosing = np.zeros(n, bool)
        if groups.with_alternatives:
            choosing = (groups.alternative[group] >= 0) & (length == groups.forced_length[group])
        beam = groups.is_beam[group] & ~forced & ~choosing & ~broken
        single = ~beam & ~broken
        if single.any():
            leaving.append(self._write_single(np.flatnonzero(single), ids, log_p, top, forced, choosing))
        if beam.any():
            numbers = groups.all_beams.numbers
            numbers = numbers[beam[groups.rows[numbers, 0]]]
            if groups.with_phrases:
                constrained = numbers[groups.has_phrases[numbers]]
                if len(constrained):
                    (wider_ids, wider_log_p), banks = self._adjusted.constrained(constrained, Candidates(ids, log_p))
                    leaving.append(self._write_beams(groups.beams(constrained), wider_ids, wider_log_p, banks))
                numbers = numbers[~groups.has_phrases[numbers]]
            if len(numbers):
                leaving.append(self._write_beams(groups.beams(numbers), ids, log_p))
        return np.concatenate(leaving)

    def _without_early_ends(self, ids: NDArray[np.int64], log_p: NDArray[np.float32]) -> NDArray[np.float32]:
        """``log_p`` with the end of text made impossible on rows that have not written enough yet."""
        if self.groups.any_min_tokens:
            too_short = self._too_short(len(ids))
            if too_short.any():
                return forbid(ids, log_p, self.end_token, too_short)
        return log_p

    def _too_short(self, n: int) -> NDArray[np.bool_]:
        """[B] rows that have not written enough yet."""
        h = self.hypotheses
        return h.length[:n] < self.groups.min_tokens.take(h.group[:n])

    def _write_greedy(self, ids: NDArray[np.int64], log_p: NDArray[np.float32]) -> Rows:
        """``_write_single`` for greedy rows alone: the usual case, and on a small model most of what the engine itself does."""
        h, groups, n = self.hypotheses, self.groups, len(ids)
        tokens, scores = ids[:, 0], log_p[:, 0]
        ended = tokens == self.end_token
        if groups.any_min_tokens and ended.any() and (early := ended & self._too_short(n)).any():
            tokens, scores = np.where(early, ids[:, 1], tokens), np.where(early, log_p[:, 1], scores)
            ended &= ~early
        h.append_to_all(self._every_row[:n], tokens, scores)
        self.tokens_written += n
        group = h.group[:n]
        if groups.streaming:
            self._send_last(np.flatnonzero(groups.streams[group]))
        ended |= h.length[:n] >= groups.max_tokens.take(group)
        (gone,) = ended.nonzero()
        self._end(gone)
        return gone

    def _write_single(
        self,
        rows: Rows,
        ids: NDArray[np.int64],
        log_p: NDArray[np.float32],
        top: NDArray[np.float32],
        forced: NDArray[np.bool_],
        choosing: NDArray[np.bool_],
    ) -> Rows:
        """Greedy, sampled and forced rows, and alternatives where they part, write one token. Returns the rows that ended."""
        h, groups = self.hypotheses, self.groups
        column = most_probable(ids, log_p)
        if groups.with_alternatives:
            parting = np.flatnonzero(choosing)
            column[parting] = nth_possible(log_p[parting], groups.alternative[h.group[parting]])
        tokens = np.take_along_axis(ids, column[:, None], axis=1)[:, 0]
        scores = np.take_along_axis(log_p, column[:, None], axis=1)[:, 0]
        sampled = rows[groups.is_sampled[h.group[rows]] & ~(forced | choosing)[rows]]
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
        self.tokens_written += len(rows)
        own = h.group[rows]
        if groups.adjusted:
            chosen = rows[groups.is_adjusted[own] & ~forced[rows]]
            h.log_probabilities[chosen, h.length[chosen] - 1] = self._adjusted.own(chosen, tokens[chosen])
        ended = (tokens[rows] == self.end_token) & ~forced[rows]
        if groups.with_stop_tokens:
            ended |= (tokens[rows, None] == groups.stop_tokens[own]).any(axis=1) & ~forced[rows]
        if groups.followed:
            ended |= self._progress.write(rows, tokens[rows])
        ended |= (h.length[rows] >= groups.max_tokens[own]) & (~groups.is_beam[own] | choosing[rows])
        ended |= groups.forced_only[own] & (h.length[rows] == groups.forced_length[own])
        if groups.streaming:
            self._send_last(rows[groups.streams[own] & ~groups.is_beam[own]])
        gone = rows[ended]
        self._end(gone)
        return gone

    def _send_last(self, rows: Rows) -> None:
        """Reports the token that each of these rows has just written."""
        h = self.hypotheses
        last = rows, h.length[rows] - 1
        written = h.tokens[last].tolist(), h.log_probabilities[last].tolist()
        for number, member, token, score in zip(h.group[rows].tolist(), h.member[rows].tolist(), *written, strict=True):
            group = self.groups[number]
            self.emit(group.request.id, TokensReady(group.alternative + member, (token,), (score,)))

    def _end(self, gone: Rows) -> None:
        """Greedy, sampled and forced rows that have ended become results."""
        h = self.hypotheses
        for row in gone.tolist():
            group = self.groups[int(h.group[row])]
            written, log_probabilities = h.written(row)
            member, adjusted = int(h.member[row]), float(h.total[row]) if group.is_adjusted else None
            reason = group.finish_reason(member, written[-1], self.end_token)
            group.finished[member] = group.hypothesis(written, log_probabilities, reason, adjusted)
            group.live_rows -= 1
            if group.live_rows == 0:
                self._finish(group)

    def _sample(
        self, rows: Rows, ids: NDArray[np.int64], log_p: NDArray[np.float32], top: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Tokens and log-probabilities drawn for ``rows``."""
        h, groups = self.hypotheses, self.groups
        tokens, scores = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        whole, adjusted = groups.needs_all_logits[h.group[rows]], groups.is_adjusted[h.group[rows]]
        for part in (np.flatnonzero(~whole), np.flatnonzero(whole & ~adjusted), np.flatnonzero(whole & adjusted)):
            if not len(part):
                continue
            own = rows[part]
            group = h.group[own]
            part_ids, part_log_p = ids[own], log_p[own]
            if whole[part[0]] and adjusted[part[0]]:
                part_ids, part_log_p = self._adjusted.all_candidates(own)
            elif whole[part[0]]:
                part_ids, part_log_p = self._all_candidates(own, ids, top)
            column = draw(
                part_log_p,
                h.draws[own, h.length[own]],
                groups.temperature[group],
                groups.top_k[group],
                groups.top_p[group],
                groups.min_p[group],
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

    def _write_beams(
        self,
        beams: Beams,
        ids: NDArray[np.int64],
        log_p: NDArray[np.float32],
        banks: NDArray[np.int64] | None = None,
    ) -> Rows:
        """One step of these beam searches. Returns the rows of the requests that ended."""
        h, groups = self.hypotheses, self.groups
        numbers, table, present, complete = beams
        # take needs a tenth of the time of brackets; nobody looks at what it finds for -1.
        choices, chances, stops = ids.take(table, axis=0), log_p.take(table, axis=0), None
        if groups.with_stop_tokens:
            stops = (choices[..., None] == groups.stop_tokens[numbers][:, None, None]).any(axis=-1)
        step = beam_step(
            beams, h.total.take(table), choices, chances, self.end_token, stops, banks if banks is None else banks[table]
        )
        ended = step.ended_source.tolist(), step.ended_token.tolist(), step.ended_log_probability.tolist()
        for source, token, score in zip(*ended, strict=True):
            group = groups[int(h.group[source])]
            tokens, scores = h.written(source)
            adjusted = None
            if group.is_adjusted:
                adjusted, score = float(h.total[source]) + score, float(self._adjusted.own(source, token))
            reason = FinishReason.END_OF_TEXT if token == self.end_token else FinishReason.STOP
            group.finished[len(group.finished)] = group.hypothesis((*tokens, token), (*scores, score), reason, adjusted)
        moved = step.survivor_source != step.survivor_target
        source, target = step.survivor_source[moved], step.survivor_target[moved]
        if len(source):
            # Siblings share most of what they have written: only what follows is copied.
            self.model.branch(source, target, h.shared(source, target), h.position[source] + 1)
            h.branch(source, target)
        if len(step.empty):
            h.total[step.empty] = -np.inf
        h.append(step.survivor_target, step.survivor_token, step.survivor_log_probability)
        self.tokens_written += len(step.survivor_target)
        if groups.adjusted:
            chosen = np.flatnonzero(groups.is_adjusted[h.group[step.survivor_target]])
            target = step.survivor_target[chosen]
            own_log_p = self._adjusted.own(step.survivor_source[chosen], step.survivor_token[chosen])
            h.log_probabilities[target, h.length[target] - 1] = own_log_p
        stopped = step.ended_source[:0]
        if groups.followed:  # a survivor that stops is finished; its row is empty until other hypotheses branch into it
            stopped = self._progress.branch(step.survivor_source, step.survivor_target, step.survivor_token)
            for row in stopped.tolist():
                self._collect(groups[int(h.group[row])], row, FinishReason.STOP)
            h.total[stopped] = -np.inf

        lengths = h.length.take(table)
        if not complete:
            lengths[~present] = 0
        at_limit = lengths.max(axis=1) >= groups.max_tokens.take(numbers)
        empty = just_ended = np.zeros(len(numbers), bool)
        if len(step.empty) or len(stopped):
            empty = (np.where(present, h.total.take(table), -np.inf) == -np.inf).all(axis=1)
        if len(step.ended_source) or len(stopped):
            ended_groups = np.zeros(len(groups.is_beam), bool)
            ended_groups[h.group[step.ended_source]] = ended_groups[h.group[stopped]] = True
            just_ended = ended_groups.take(numbers)
        gone = []
        for i in np.flatnonzero(at_limit | empty | just_ended | groups.streams[numbers]).tolist():
            group, own = groups[int(numbers[i])], table[i][present[i]]
            live = own[h.total[own] > -np.inf]
            if at_limit[i] and not group.enough:
                for row in live.tolist():
                    self._collect(group, row, FinishReason.LENGTH)
            if group.enough or at_limit[i] or empty[i]:
                self._finish(group)
                gone.append(own)
            elif group.request.stream:
                self._send_agreed(group, live)
        return np.concatenate(gone) if gone else self._every_row[:0]

    def _collect(self, group: Group, row: int, reason: FinishReason) -> None:
        """What a row of a beam search has written becomes one of its finished hypotheses."""
        tokens, scores = self.hypotheses.written(row)
        adjusted = float(self.hypotheses.total[row]) if group.is_adjusted else None
        group.finished[len(group.finished)] = group.hypothesis(tokens, scores, reason, adjusted)

    def _send_agreed(self, group: Group, live: Rows) -> None:
        """Reports the tokens on which every hypothesis that may still win agrees: the live ones and the best finished one."""
        h = self.hypotheses
        contenders = h.tokens[live, : h.length[live[0]]]
        agreed = agreed_length(contenders, group.sent)
        ended = list(group.finished.values())
        if ended and not group.request.decoding.coverage_penalty:  # with it, the best one is known at the end
            ended = [max(ended, key=lambda f: f.score)]
        for best in (hypothesis.tokens for hypothesis in ended):
            while agreed > group.sent and tuple(contenders[0, group.sent : agreed]) != best[group.sent : agreed]:
                agreed -= 1
        if agreed > group.sent:
            tokens = tuple(contenders[0, group.sent : agreed].tolist())
            scores = tuple(h.log_probabilities[live[0], group.sent : agreed].tolist())
            self.emit(group.request.id, TokensReady(group.alternative, tokens, scores))
            group.sent = agreed

    def _finish(self, group: Group) -> None:
        results = self._results(group)
        if group.request.stream and group.is_beam and group.sent < len(results[0].tokens):
            rest = slice(group.sent, None)
            ready = TokensReady(group.alternative, results[0].tokens[rest], results[0].log_probabilities[rest])
            self.emit(group.request.id, ready)
        self.groups.remove(group)
        family = group.family
        if group.request.decoding.alternatives:
            family.results[group.alternative] = results[0]
            results = tuple(family.results[i] for i in sorted(family.results))
        if not family.live:
            self.emit(group.request.id, Finished(results))

    def _results(self, group: Group) -> tuple[Hypothesis, ...]:
        request = group.request
        if request.decoding.coverage_penalty:  # ranks all that have ended
            assert self._aligner is not None
            group.finished = dict(enumerate(self._aligner.complete(list(group.finished.values()), request)))
            return group.results()
        if request.attention is not Attention.NONE:
            assert self._aligner is not None
            return tuple(self._aligner.complete(group.results(), request))
        return group.results()

    def _fail_broken(self, broken: NDArray[np.bool_]) -> Rows:
        """Rows whose scores are not numbers fail alone, with their request; their neighbours go on."""
        h = self.hypotheses
        gone = []
        groups = [self.groups[number] for number in np.unique(h.group[np.flatnonzero(broken)]).tolist()]
        for family in {group.request.id: group.family for group in groups}.values():
            gone.append(np.flatnonzero(np.isin(h.group[: len(broken)], [group.number for group in family.live])))
            self.emit(family.live[0].request.id, Failed(Failure.NUMERICS, "the model's scores are not finite for this input"))
            for group in list(family.live):
                self.groups.remove(group)
        rows = np.concatenate(gone)
        broken[rows] = True  # the group's sound rows go with it
        return rows
