"""One step of beam search for every group of the running batch at once, with mixed widths.

Shapes: G groups, W the widest beam among them, C candidates a row. A narrower group's unused places are marked by row -1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.batch.constraints import order_by_banks
from server.batch.kv_cache import Rows

Floats = NDArray[np.float32]


class Beams(NamedTuple):
    """Groups under beam search, and where their members live."""

    numbers: Rows
    """[G] of the groups."""
    rows: Rows
    """[G, W] row of each member; -1 where the group is narrower."""
    present: NDArray[np.bool_]
    """[G, W] where it is not."""
    complete: bool
    """Whether all are equally wide."""

    @classmethod
    def of(cls, numbers: Rows, rows: Rows) -> Beams:
        present = rows >= 0
        return cls(numbers, rows, present, bool(present.all()))


class BeamStep(NamedTuple):
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
    beams: Beams,
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
        totals: [G, W] log-probability of each hypothesis so far; -inf where there is none.
        ids, log_probabilities: [G, W, C], best first; C at least 2 x W (one more where the end is forbidden).
        end: id of the end-of-text token.
        stops: [G, W, C] candidates that end the text like it.
        banks: [G, W, C] how much of required phrases a candidate has written; candidates are then ranked as in
            ``constraints.order_by_banks``, and their order along C does not matter.
    """
    _, rows, present, complete = beams
    groups, width = rows.shape
    candidates = ids.shape[2]
    scores = totals[:, :, None] + log_probabilities
    if not complete:
        scores[~present] = -np.inf
    scores = scores.reshape(groups, -1)
    order = (-scores).argsort(axis=1, kind="stable") if banks is None else order_by_banks(scores, banks.reshape(groups, -1))
    # From here on by cell, counted through [G, W, C]; cell // C is a place, counted through [G, W].
    cell = order[:, : 2 * width]
    if groups > 1:
        cell = cell + np.arange(0, groups * width * candidates, width * candidates)[:, None]
    ranked, ends = scores.take(cell), ids.take(cell) == end
    if stops is not None:
        ends |= stops.take(cell)
    flat_rows = rows.ravel()
    # Usually no text ends: the first candidates survive, as many as there are places.
    usual = complete and not ends[:, :width].any() and ranked[:, width - 1].min() > -np.inf
    if usual:
        survivor, ended = cell[:, :width].ravel(), cell[:0, 0]
    else:
        widths = present.sum(axis=1)
        rank = np.arange(cell.shape[1])
        possible = (ranked > -np.inf) & (rank < 2 * widths[:, None])
        ends &= possible
        alive = possible & ~ends
        alive &= alive.cumsum(axis=1) <= widths[:, None]
        survivor, ended = cell[alive], cell[ends & (rank < widths[:, None])]  # by group, best first
    source = survivor // candidates
    target = _places(source, present.ravel(), width)
    empty = flat_rows[:0]
    if not usual:
        vacant = present.ravel().copy()
        vacant[target] = False
        empty = flat_rows[vacant]
    return BeamStep(
        survivor_source=flat_rows.take(source),
        survivor_target=flat_rows.take(target),
        survivor_token=ids.take(survivor),
        survivor_log_probability=log_probabilities.take(survivor),
        empty=empty,
        ended_source=flat_rows.take(ended // candidates),
        ended_token=ids.take(ended),
        ended_log_probability=log_probabilities.take(ended),
    )


def _places(parent: Rows, present: NDArray[np.bool_], width: int) -> Rows:
    """The place of each survivor: a parent's first child takes the parent's, the others take childless ones of the group.

    Args:
        parent: [survivors] its parent's place, by group.
        present: [G W] places that have a row.
    """
    survivors = np.arange(len(parent))
    child = np.full(len(present), -1)
    child[parent[::-1]] = survivors[::-1]  # of several children the first one, written last, stays
    goes = (child.take(parent) != survivors).nonzero()[0]
    if not len(goes):
        return parent
    childless = (present & (child < 0)).nonzero()[0]
    places = parent.copy()
    if len(goes) == len(childless):
        places[goes] = childless
    else:  # the i-th survivor of a group that must go elsewhere takes the group's i-th childless place
        group = parent[goes] // width
        nth = np.arange(len(goes)) - group.searchsorted(group)
        places[goes] = childless[(childless // width).searchsorted(group) + nth]
    return places


def agreed_length(tokens: NDArray[np.int32], known: int) -> int:
    """How many leading tokens all hypotheses [N, T] share, given that the first ``known`` are shared."""
    if len(tokens) == 1:
        return tokens.shape[1]
    same = (tokens[:, known:] == tokens[:1, known:]).all(axis=0)
    return known + (int(same.argmin()) if not same.all() else same.size)
