"""The live requests. What each asked for stands in arrays, one entry per group: a step looks it up for all rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from server.batch.beam import Beams
from server.batch.constraints import RequiredPhrases
from server.batch.kv_cache import Rows
from server.batch.penalties import AdjustmentTable
from server.batch.stopping import StoppingText
from server.requests import MAX_STOP_TOKENS, Adjustments, Decoding, FinishReason, GenerationRequest, Hypothesis

MAX_CANDIDATES = 64
"""Candidates a step brings back for each row; a sampled row that may need more reads all logits."""


@dataclass(slots=True)
class Family:
    """The groups of one request: one, or one for each alternative."""

    live: list[Group] = field(default_factory=list)
    results: dict[int, Hypothesis] = field(default_factory=dict)
    """The best hypothesis of each alternative that has ended."""


@dataclass(slots=True)
class Group:
    """One live request, or one of its alternatives."""

    number: int
    request: GenerationRequest
    live_rows: int
    family: Family
    alternative: int = 0
    """Which of the best tokens its hypotheses begin with, after the forced prefix."""
    finished: dict[int, Hypothesis] = field(default_factory=dict)
    """By sample; under beam search, by order of finishing."""
    sent: int = 0
    """Tokens already reported under beam search."""
    texts: list[StoppingText] = field(default_factory=list)
    """What each member has written, where stop strings are looked for."""
    phrases: RequiredPhrases | None = None
    is_adjusted: bool = False
    """Tokens are chosen from an adjusted distribution."""

    @property
    def is_beam(self) -> bool:
        return self.request.decoding.beams > 1

    @property
    def is_plain(self) -> bool:
        """Greedy or beam search, and nothing else to look after at each step than a least length and who is to hear of it."""
        decoding = self.request.decoding
        special = decoding.sampling or self.request.forced or decoding.alternatives
        return not (special or self.is_adjusted or decoding.stop_tokens or self.is_followed)

    @property
    def is_followed(self) -> bool:
        """Each token is looked at: see ``server.batch.progress``."""
        decoding = self.request.decoding
        return bool(decoding.stop_strings or decoding.required_phrases)

    @property
    def enough(self) -> bool:
        """Under beam search: as many hypotheses have ended as the patience asks for (Kasai et al. 2022)."""
        decoding = self.request.decoding
        return len(self.finished) >= max(1, round(decoding.beams * decoding.patience))

    def finish_reason(self, member: int, token: int, end_token: int) -> FinishReason:
        """Why the output ended whose last token this is."""
        if token == end_token:
            return FinishReason.END_OF_TEXT
        stopped = token in self.request.decoding.stop_tokens or (self.texts and self.texts[member].stopped)
        return FinishReason.STOP if stopped else FinishReason.LENGTH

    def hypothesis(
        self, tokens: tuple[int, ...], log_probabilities: tuple[float, ...], reason: FinishReason, adjusted: float | None = None
    ) -> Hypothesis:
        """Args: adjusted: sum of the log-probabilities by which tokens were chosen; None where they are the model's own."""
        total = sum(log_probabilities)
        return Hypothesis(
            tokens=tokens,
            log_probabilities=log_probabilities,
            log_probability=total,
            score=(total if adjusted is None else adjusted) / len(tokens) ** self.request.decoding.length_penalty,
            finish_reason=reason,
        )

    def results(self) -> tuple[Hypothesis, ...]:
        """Best first under beam search, in order of the samples otherwise."""
        if self.is_beam:
            ranked = sorted(self.finished.values(), key=lambda h: -h.score)
            return tuple(ranked[: self.request.decoding.hypotheses])
        return tuple(self.finished[i] for i in sorted(self.finished))


_NO_ADJUSTMENTS = Adjustments()


def _is_adjusted(decoding: Decoding) -> bool:
    early_stop = decoding.min_tokens and decoding.stop_tokens
    return bool(early_stop or decoding.required_phrases) or decoding.adjustments != _NO_ADJUSTMENTS


def _candidates(decoding: Decoding) -> int:
    """How many candidates of each row a step must bring back for such a request."""
    spare = 1 if decoding.min_tokens else 0  # the forbidden end-of-text token may take a place
    if decoding.beams > 1:
        usual = 2 * decoding.beams
    elif decoding.sampling and 0 < decoding.sampling.top_k < MAX_CANDIDATES:
        usual = decoding.sampling.top_k
    else:
        usual = 1
    return max(usual, decoding.alternatives) + spare


class GroupTable:
    """The live groups by number and by request, and their settings as arrays of one entry per group number.

    Args:
        capacity: most groups at once (no more than rows).
        longest: longest output.
    """

    def __init__(self, capacity: int, longest: int) -> None:
        self._by_number: dict[int, Group] = {}
        self._by_request: dict[str, Group] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self.is_beam = np.zeros(capacity, bool)
        self.is_sampled = np.zeros(capacity, bool)
        self.streams = np.zeros(capacity, bool)
        self.forced_only = np.zeros(capacity, bool)
        self.is_adjusted = np.zeros(capacity, bool)
        self.is_followed = np.zeros(capacity, bool)
        self.has_phrases = np.zeros(capacity, bool)
        self.alternative = np.zeros(capacity, np.int64)
        """Which of the best tokens follows the forced prefix; -1: none in particular."""
        self.stop_tokens = np.full((capacity, MAX_STOP_TOKENS), -1, np.int64)
        self.adjustments = AdjustmentTable(capacity)
        self.needs_all_logits = np.zeros(capacity, bool)
        self.min_tokens = np.zeros(capacity, np.int32)
        self.max_tokens = np.zeros(capacity, np.int32)
        self.temperature = np.ones(capacity, np.float64)
        self.top_k = np.zeros(capacity, np.int64)
        self.top_p = np.ones(capacity, np.float64)
        self.min_p = np.zeros(capacity, np.float64)
        self.forced = np.zeros((capacity, longest), np.int64)
        self.forced_length = np.zeros(capacity, np.int32)
        self.rows = np.full((capacity, min(capacity, MAX_CANDIDATES)), -1)
        """Under beam search, the row of each member; -1 behind them."""
        self.widths = np.zeros(capacity, np.intp)
        """How many members."""
        self.candidates = np.zeros(capacity, np.int32)
        """Candidates of each row that a step must bring back."""
        self._special = 0
        self._greedy = 0
        self._beams = 0
        self._with_min_tokens = 0
        self._all_beams: Beams | None = None
        self._most_candidates: int | None = None
        self.adjusted = 0
        """How many groups choose from an adjusted distribution, ..."""
        self.with_alternatives = 0
        """... are alternatives, ..."""
        self.with_stop_tokens = 0
        """... end at stop tokens, ..."""
        self.with_phrases = 0
        """... must contain phrases, ..."""
        self.followed = 0
        """... are followed token by token, ..."""
        self.streaming = 0
        """... or are told of as they are written."""

    def __len__(self) -> int:
        """Live requests."""
        return len(self._by_request)

    def __iter__(self) -> Iterator[Group]:
        return iter(list(self._by_number.values()))

    @property
    def all_plain(self) -> bool:
        return not self._special

    @property
    def any_greedy(self) -> bool:
        """Whether a group is not a beam search."""
        return self._greedy > 0

    @property
    def any_beams(self) -> bool:
        return self._beams > 0

    @property
    def any_min_tokens(self) -> bool:
        return self._with_min_tokens > 0

    @property
    def all_beams(self) -> Beams:
        """The groups under beam search, in order of arrival."""
        if self._all_beams is None:
            self._all_beams = self.beams(np.array([g.number for g in self._by_number.values() if g.is_beam], np.intp))
        return self._all_beams

    def beams(self, numbers: Rows) -> Beams:
        """Some of them."""
        widest = int(self.widths[numbers].max(initial=0))
        return Beams.of(numbers, self.rows.take(numbers, axis=0)[:, :widest])

    @property
    def most_candidates(self) -> int:
        """Candidates of each row that a step must bring back."""
        if self._most_candidates is None:
            self._most_candidates = max(_candidates(g.request.decoding) for g in self._by_number.values())
        return self._most_candidates

    def __getitem__(self, number: int) -> Group:
        return self._by_number[number]

    def of_request(self, request_id: str) -> Group | None:
        """Of alternatives, any one."""
        return self._by_request.get(request_id)

    def add(self, request: GenerationRequest) -> list[Group]:
        """Its groups: one, or one for each alternative."""
        family = Family()
        return [self._add(request, family, i) for i in range(max(1, request.decoding.alternatives))]

    def _add(self, request: GenerationRequest, family: Family, alternative: int) -> Group:
        number = self._free.pop()
        decoding = request.decoding
        rows = decoding.rows // max(1, decoding.alternatives)
        group = self._by_number[number] = self._by_request[request.id] = Group(number, request, rows, family, alternative)
        family.live.append(group)
        group.is_adjusted = _is_adjusted(decoding)
        self.alternative[number] = alternative if decoding.alternatives else -1
        sampling = decoding.sampling
        self.is_beam[number] = group.is_beam
        self.is_sampled[number] = sampling is not None
        self.streams[number] = request.stream
        self.forced_only[number] = request.forced_only
        self.min_tokens[number] = decoding.min_tokens
        self.max_tokens[number] = decoding.max_tokens
        self.forced_length[number] = len(request.forced)
        if request.forced:
            self.forced[number, : len(request.forced)] = request.forced
        self.candidates[number] = _candidates(decoding)
        self.is_adjusted[number] = group.is_adjusted
        if group.is_adjusted:
            self.adjustments.add(number, decoding.adjustments)
        self.stop_tokens[number] = -1
        if decoding.stop_tokens:
            self.stop_tokens[number, : len(decoding.stop_tokens)] = decoding.stop_tokens
        self.is_followed[number] = group.is_followed
        self.has_phrases[number] = bool(decoding.required_phrases)
        if decoding.required_phrases:
            group.phrases = RequiredPhrases(decoding.required_phrases, rows)
        self._count(group, 1)
        if sampling:
            self.needs_all_logits[number] = not 0 < sampling.top_k < MAX_CANDIDATES
            self.temperature[number] = sampling.temperature
            self.top_k[number] = sampling.top_k
            self.top_p[number] = sampling.top_p
            self.min_p[number] = sampling.min_p
        return group

    def remove(self, group: Group) -> None:
        del self._by_number[group.number]
        group.family.live.remove(group)
        if not group.family.live:
            del self._by_request[group.request.id]
        self._count(group, -1)
        self.adjustments.remove(group.number)
        self._free.append(group.number)

    def place(self, group: Group, rows: Rows) -> None:
        """Member i of a beam search lives in rows[i]."""
        self.rows[group.number] = -1
        self.rows[group.number, : len(rows)] = rows
        self.widths[group.number] = len(rows)
        self._all_beams = None

    def move(self, numbers: Rows, members: Rows, rows: Rows) -> None:
        """Member members[i] of beam search numbers[i] lives in rows[i] from now on."""
        self.rows[numbers, members] = rows
        self._all_beams = None

    def _count(self, group: Group, change: int) -> None:
        decoding = group.request.decoding
        self._special += change * (not group.is_plain)
        self._greedy += change * (not group.is_beam)
        self._beams += change * group.is_beam
        self.streaming += change * group.request.stream
        self._with_min_tokens += change * (decoding.min_tokens > 0)
        self.adjusted += change * group.is_adjusted
        self.with_alternatives += change * (decoding.alternatives > 0)
        self.with_stop_tokens += change * bool(decoding.stop_tokens)
        self.followed += change * group.is_followed
        self.with_phrases += change * bool(decoding.required_phrases)
        self._most_candidates = None
        if group.is_beam:
            self._all_beams = None
