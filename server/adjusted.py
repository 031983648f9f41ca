"""Candidates of rows whose requests change the model's distribution, chosen from all logits.

Two log-probabilities belong to each token of such a row: the adjusted one, by which it is chosen and ranked, and the model's
own, which is what callers are told. Rows of other requests never come here.

Shapes: B rows of a call, W candidates, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.groups import GroupTable
from server.hypotheses import Hypotheses
from server.kv_cache import Rows
from server.sequence_model import Candidates, SequenceModel

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class AdjustedRows:
    """The adjusted distributions of one step."""

    def __init__(self, model: SequenceModel, hypotheses: Hypotheses, groups: GroupTable, end_token: int) -> None:
        self._model, self._hypotheses, self._groups, self._end_token = model, hypotheses, groups, end_token
        self._place = np.zeros(model.rows, np.intp)
        self._own = np.empty((0, 0), np.float32)
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
        logits = self._model.logits(rows)
        # The best token's logit and log-probability differ by the same constant as any other's.
        self._own = logits - (logits[np.arange(len(rows)), ids[rows, 0]] - top[rows])[:, None]
        self._adjusted = self._own.copy()
        groups.adjustments.reweigh(self._adjusted, group, tokens, length, logits)
        groups.adjustments.suppress(self._adjusted, group)
        too_short = np.flatnonzero(length < groups.min_tokens[group])
        if len(too_short):
            self._adjusted[too_short, self._end_token] = -np.inf
            row, place = np.nonzero(groups.stop_tokens[group[too_short]] >= 0)
            self._adjusted[too_short[row], groups.stop_tokens[group[too_short[row]], place]] = -np.inf
        groups.adjustments.forbid_repeats(self._adjusted, group, tokens, length)
        self._place[rows] = np.arange(len(rows))
        ids, log_p = ids.copy(), log_p.copy()
        width = min(int(groups.candidates[group].max()), ids.shape[1])
        best = _best(self._adjusted, width)
        ids[rows, :width] = best
        log_p[rows, :width] = np.take_along_axis(self._adjusted, best, axis=1)
        log_p[rows, width:] = -np.inf
        return Candidates(ids, log_p)

    def all_candidates(self, rows: Rows) -> tuple[Ids, Floats]:
        """The whole vocabulary of each row [B], best first."""
        adjusted = self._adjusted[self._place[rows]]
        order = np.argsort(-adjusted, axis=1, kind="stable")
        return order, np.take_along_axis(adjusted, order, axis=1)

    def own(self, rows: Rows, tokens: Ids) -> Floats:
        """The model's own log-probability of tokens[i] [B] in row rows[i]."""
        return self._own[self._place[rows], tokens]


def _best(log_p: Floats, width: int) -> Ids:
    """Ids [B, W] of the ``width`` best tokens of each row of [B, V], best first; of equals the lowest id first."""
    if width == 1:
        return log_p.argmax(axis=1)[:, None]
    if width < log_p.shape[1]:
        best = np.sort(np.argpartition(-log_p, width - 1, axis=1)[:, :width], axis=1)
    else:
        best = np.broadcast_to(np.arange(log_p.shape[1]), log_p.shape)
    order = np.argsort(-np.take_along_axis(log_p, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)
