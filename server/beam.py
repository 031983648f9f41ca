"""One step of beam search for every group of the running batch at once, with mixed widths.

Shapes: G groups, W the widest beam among them, C candidates a row. A narrower group's unused places are marked by row -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.kv_cache import Rows

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BeamStep:
    """What one step decided, as flat arrays."""

    survivor_source: Rows
    """Row each surviving hypothesis continues."""
    survivor_target: Rows
    """Row it lives in from now on. No target that differs from its source is the source of any survivor."""
    survivor_token: NDArray[np.int64]
    survivor_log_probability: Floats
    empty: Rows
    """Rows of groups that hold no hypothesis after this step."""
    ended_source: Rows
    """Row each finished hypothesis continues with the end-of-text token."""
    ended_log_probability: Floats


def beam_step(rows: NDArray[np.intp], totals: Floats, ids: NDArray[np.int64], log_probabilities: Floats, end: int) -> BeamStep:
    """Ranks the continuations of each group's hypotheses and decides which live on.

    Of the 2 x width best continuations of a group, one that ends the text is finished if it ranks among the first ``width``;
    the first ``width`` others survive. A survivor stays in its parent's row where it can, so that few cache rows are copied.

    Args:
        rows: [G, W] rows of each group; -1 where the group is narrower.
        totals: [G, W] log-probability of each hypothesis so far; -inf where there is none.
        ids, log_probabilities: [G, W, C], best first; C at least 2 x W (one more where the end is forbidden).
        end: id of the end-of-text token.
    """
    groups, width = rows.shape
    candidates = ids.shape[2]
    present = rows >= 0
    widths = present.sum(axis=1)
    scores = np.where(present[:, :, None], totals[:, :, None] + log_probabilities, -np.inf).reshape(groups, -1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : 2 * width]  # [G, 2W]
    ranked = np.take_along_axis(scores, order, axis=1)
    parent = order // candidates
    token = np.take_along_axis(ids.reshape(groups, -1), order, axis=1)
    log_p = np.take_along_axis(log_probabilities.reshape(groups, -1), order, axis=1)

    rank = np.arange(ranked.shape[1])
    possible = (ranked > -np.inf) & (rank < 2 * widths[:, None])
    ends = possible & (token == end)
    ended = ends & (rank < widths[:, None])
    alive = possible & ~ends
    alive &= alive.cumsum(axis=1) <= widths[:, None]

    group, column = np.nonzero(alive)  # survivors, by group, best first
    source_place = parent[group, column]
    target_place = _places(group, source_place, groups, width, present)
    target = rows[group, target_place]
    vacant = present.copy()
    vacant[group, target_place] = False
    ended_group, ended_column = np.nonzero(ended)
    return BeamStep(
        survivor_source=rows[group, source_place],
        survivor_target=target,
        survivor_token=token[group, column],
        survivor_log_probability=log_p[group, column],
        empty=rows[vacant],
        ended_source=rows[ended_group, parent[ended_group, ended_column]],
        ended_log_probability=log_p[ended_group, ended_column],
    )


def _places(group: Rows, parent: Rows, groups: int, width: int, present: NDArray[np.bool_]) -> Rows:
    """The place [survivors] of each survivor: a parent's first child takes the parent's, the others take childless ones."""
    key = group * width + parent
    _, first = np.unique(key, return_index=True)
    stays = np.zeros(len(key), dtype=bool)
    stays[first] = True
    childless = present.copy()
    childless[group, parent] = False
    # The i-th survivor of a group that must go elsewhere takes the group's i-th childless place.
    goes = np.flatnonzero(~stays)
    goes_group = group[goes]
    start = np.searchsorted(goes_group, np.arange(groups))
    nth = np.arange(len(goes)) - start[goes_group]
    free = np.argsort(~childless, axis=1, kind="stable")  # childless places first, in order
    places = parent.copy()
    places[goes] = free[goes_group, nth]
    return places


def agreed_length(tokens: NDArray[np.int32], known: int) -> int:
    """How many leading tokens all hypotheses [N, T] share, given that the first ``known`` are shared."""
    if len(tokens) == 1:
        return tokens.shape[1]
    same = (tokens[:, known:] == tokens[:1, known:]).all(axis=0)
    return known + (int(same.argmin()) if not same.all() else same.size)
