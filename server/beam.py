"""One step of beam search for every group of the running batch at once, with mixed widths.

Shapes: G groups, W the widest beam among them, C candidates a row. A narrower group's unused places are marked by row -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.constraints import order_by_banks
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
    """Row each finished hypothesis continues with a token that ends it."""
    ended_token: NDArray[np.int64]
    ended_log_probability: Floats


def beam_step(
    rows: NDArray[np.intp],
    totals: Floats,
    ids: NDArray[np.int64],
    log_probabilities: Floats,
    end: int,
    stops: NDArray[np.bool_] | None = None,
    banks: NDArray[np.int64] | None = None,
) -> BeamStep:
    """Ranks the continuations of each group's hypotheses and decides which live on.

    Of the 2 x width best continuations of a group, one that ends the text is finished if it ranks among the first ``width``;
    the first ``width`` others survive. A survivor stays in its parent's row where it can, so that few cache rows are copied.

    Args:
        rows: [G, W] rows of each group; -1 where the group is narrower.
        totals: [G, W] log-probability of each hypothesis so far; -inf where there is none.
        ids, log_probabilities: [G, W, C], best first; C at least 2 x W (one more where the end is forbidden).
        end: id of the end-of-text token.
        stops: [G, W, C] candidates that end the text like it.
        banks: [G, W, C] how much of required phrases a candidate has written; candidates are then ranked as in
            ``constraints.order_by_banks``, and their order along C does not matter.
    """
    groups, width = rows.shape
    candidates = ids.shape[2]
    present = rows >= 0
    complete = bool(present.all())
    scores = totals[:, :, None] + log_probabilities
    if not complete:
        scores[~present] = -np.inf
    scores = scores.reshape(groups, -1)
    order = np.argsort(-scores, axis=1, kind="stable") if banks is None else order_by_banks(scores, banks.reshape(groups, -1))
    order = order[:, : 2 * width]  # [G, 2W]
    cell = order + (np.arange(groups) * scores.shape[1])[:, None]
    ranked, token, log_p = scores.take(cell), ids.take(cell), log_probabilities.take(cell)
    parent = order // candidates

    ends = token == end
    if stops is not None:
        ends |= stops.take(cell)
    if complete and not ends[:, :width].any() and ranked[:, width - 1].min() > -np.inf:  # the usual step: the first survive
        group, column = np.divmod(np.arange(groups * width), width)
        ended = ends[:, :0]
    else:
        widths = present.sum(axis=1)
        rank = np.arange(ranked.shape[1])
        possible = (ranked > -np.inf) & (rank < 2 * widths[:, None])
        ends &= possible
        ended = ends & (rank < widths[:, None])
        alive = possible & ~ends
        alive &= alive.cumsum(axis=1) <= widths[:, None]
        group, column = np.nonzero(alive)  # survivors, by group, best first
    ended_group, ended_column = np.nonzero(ended)
    source_place = parent[group, column]
    target_place = _places(group, source_place, groups, width, present)
    target = rows[group, target_place]
    vacant = present.copy()
    vacant[group, target_place] = False
    return BeamStep(
        survivor_source=rows[group, source_place],
        survivor_target=target,
        survivor_token=token[group, column],
        survivor_log_probability=log_p[group, column],
        empty=rows[vacant],
        ended_source=rows[ended_group, parent[ended_group, ended_column]],
        ended_token=token[ended_group, ended_column],
        ended_log_probability=log_p[ended_group, ended_column],
    )


def _places(group: Rows, parent: Rows, groups: int, width: int, present: NDArray[np.bool_]) -> Rows:
    """The place [survivors] of each survivor: a parent's first child takes the parent's, the others take childless ones."""
    key = group * width + parent
    child = np.full(groups * width, -1)
    child[key[::-1]] = np.arange(len(key))[::-1]  # of several children the first one, written last, stays
    goes = np.flatnonzero(child[key] != np.arange(len(key)))
    if not len(goes):
        return parent
    childless = present & (child < 0).reshape(groups, width)
    # The i-th survivor of a group that must go elsewhere takes the group's i-th childless place.
    goes_group = group[goes]
    nth = np.arange(len(goes)) - np.searchsorted(goes_group, goes_group)
    free_group, free_place = np.nonzero(childless)
    places = parent.copy()
    places[goes] = free_place[np.searchsorted(free_group, goes_group) + nth]
    return places


def agreed_length(tokens: NDArray[np.int32], known: int) -> int:
    """How many leading tokens all hypotheses [N, T] share, given that the first ``known`` are shared."""
    if len(tokens) == 1:
        return tokens.shape[1]
    same = (tokens[:, known:] == tokens[:1, known:]).all(axis=0)
    return known + (int(same.argmin()) if not same.all() else same.size)
