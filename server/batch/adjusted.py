"""Candidates of rows whose requests change the model's distribution, chosen from all logits.

Two log-probabilities belong to each token of such a row: the adjusted one, by which it is chosen and ranked, and the model's
own, which is what callers are told. Rows of other requests never come here.

Shapes: B rows of a call, W candidates, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.batch.groups import GroupTable
from server.batch.hypotheses import Hypotheses
from server.batch.kv_cache import Rows
from server.batch.sequence_model import Candidates, SequenceModel

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_BLOCK = 64
"""Tokens that are compared as one before the best are sorted out."""


class AdjustedRows:
    """The adjusted distributions of one step."""

    def __init__(self, model: SequenceModel, hypotheses: Hypotheses, groups: GroupTable, end_token: int) -> None:
        self._model, self._hypotheses, self._groups, self._end_token = model, hypotheses, groups, end_token
        self._place = np.zeros(model.rows, np.intp)
        self._logits = np.empty((0, 0), np.float32)
        self._shift = np.empty(0, np.float32)
        self._adjusted = np.empty((0, 0), np.float32)

    def read(self, rows: Rows, candidates: Candidates, top: Floats) -> Candidates:
        """Adjusts the distributions of ``rows`` for this step.

        Args:
            top: the best log-probability of every live row, whether it may be chosen or not.

        Returns:
            The candidates of all rows, those of ``rows`` adjusted: best first, the lowest id of equals; forbidden ones at -inf.
        """
        h, groups = self._hypotheses, self._groups
        ids, log_p = candidates
        group, length = h.group[rows], h.length[rows]
        tokens = h.tokens[rows, : int(length.max())]
        self._logits = self._model.logits(rows)
        # The best token's logit and log-probability differ by the same constant as any other's.
        self._shift = top[rows] - self._logits[np.arange(len(rows)), ids[rows, 0]]
        self._adjusted = groups.adjustments.reweigh(self._logits, self._shift, group, tokens, length)
        groups.adjustments.suppress(self._adjusted, group)
        too_short = length < groups.min_tokens[group]
        for i in np.flatnonzero(groups.has_phrases[group]).tolist():
            phrases = groups[int(group[i])].phrases
            too_short[i] |= phrases is not None and phrases.need(int(h.member[rows[i]])) > 0
        unended = np.flatnonzero(too_short)
        if len(unended):
            self._adjusted[unended, self._end_token] = -np.inf
            row, place = np.nonzero(groups.stop_tokens[group[unended]] >= 0)
            self._adjusted[unended[row], groups.stop_tokens[group[unended[row]], place]] = -np.inf
        groups.adjustments.forbid_repeats(self._adjusted, group, tokens, length)
        self._place[rows] = np.arange(len(rows))
        ids, log_p = ids.copy(), log_p.copy()
        width = min(int(groups.candidates[group].max()), ids.shape[1])
        best = best_tokens(self._adjusted, width)
        ids[rows, :width] = best
        log_p[rows, :width] = np.take_along_axis(self._adjusted, best, axis=1)
        log_p[rows, width:] = -np.inf
        return Candidates(ids, log_p)

    def all_candidates(self, rows: Rows) -> tuple[Ids, Floats]:
        """The whole vocabulary of each row [B], best first."""
        adjusted = self._adjusted[self._place[rows]]
        order = np.argsort(-adjusted, axis=1, kind="stable")
        return order, np.take_along_axis(adjusted, order, axis=1)

    def constrained(self, numbers: Rows, candidates: Candidates) -> tuple[Candidates, Ids]:
        """The candidates of groups that must contain phrases, and what beam search ranks these by.

        Args:
            candidates: those of all rows, as ``read`` gave them.

        Returns:
            Candidates [R, C] of all rows, only those of these groups filled in: the 2 x beams best, and those that go on with a
            phrase; -inf where the rest of the phrases would no longer fit. Banks [R, C]: tokens of phrases that are written.
        """
        h, groups = self._hypotheses, self._groups
        found: dict[int, tuple[list[int], list[float], list[int]]] = {}
        for number in numbers.tolist():
            group = groups[number]
            decoding, phrases = group.request.decoding, group.phrases
            assert phrases is not None
            for member, row in enumerate(groups.rows[number, : decoding.beams].tolist()):
                possible = np.isfinite(candidates.log_probabilities[row, : 2 * decoding.beams])
                best = candidates.ids[row, : 2 * decoding.beams][possible].tolist()
                tokens = [*best, *(token for token in phrases.advancing(member) if token not in best)]
                left = decoding.max_tokens - int(h.length[row]) - 1
                needs = phrases.needs_after(member, tokens)
                scores = self._adjusted[self._place[row], tokens].tolist()
                fitting = [score if need <= left else -np.inf for score, need in zip(scores, needs, strict=True)]
                found[row] = tokens, fitting, [phrases.total - need for need in needs]
        shape = len(candidates.ids), max(len(tokens) for tokens, _, _ in found.values())
        ids, log_p, banks = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int64)
        for row, (tokens, scores, written) in found.items():
            width = len(tokens)
            ids[row, :width], log_p[row, :width], banks[row, :width] = tokens, scores, written
        return Candidates(ids, log_p), banks

    def own(self, rows: Rows, tokens: Ids) -> Floats:
        """The model's own log-probability of tokens[i] [B] in row rows[i]."""
        place = self._place[rows]
        return self._logits[place, tokens] + self._shift[place]


def best_tokens(log_p: Floats, width: int) -> Ids:
    """Ids [B, W] of the ``width`` best tokens of each row of [B, V], best first; of equals the lowest id first."""
    if width == 1:
        return log_p.argmax(axis=1)[:, None]
    rows, vocab_size = log_p.shape
    blocks = vocab_size // _BLOCK
    heads = log_p[:, : blocks * _BLOCK].reshape(rows, _BLOCK, blocks).max(axis=1)
    heads = np.concatenate([heads, log_p[:, blocks * _BLOCK :]], axis=1)
    # So many tokens as blocks are at least as good as the block that comes ``width``-th: the best ones are among them.
    at = heads.shape[1] - width
    floor = np.partition(heads, at, axis=1)[:, at] if at > 0 else np.full(rows, -np.inf, np.float32)
    row, token = np.divmod(np.flatnonzero(log_p >= floor[:, None]), vocab_size)
    order = np.lexsort((-log_p[row, token], row))
    first = np.searchsorted(row, np.arange(rows))
    return token[order][first[:, None] + np.arange(width)]
