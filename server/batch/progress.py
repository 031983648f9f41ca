"""What some requests follow token by token: texts in which stop strings are looked for, and required phrases.

Each is kept by group and member, which a hypothesis keeps when its row moves. Rows of other requests cost nothing here.

Shapes: B rows of a call.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.batch.groups import GroupTable
from server.batch.hypotheses import Hypotheses
from server.batch.kv_cache import Rows


class Progress:
    """Follows what the rows of ``groups`` write."""

    def __init__(self, hypotheses: Hypotheses, groups: GroupTable) -> None:
        self._hypotheses, self._groups = hypotheses, groups

    def write(self, rows: Rows, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Row rows[i] [B] has written tokens[i]. Whether its text now holds a stop string."""
        h, groups = self._hypotheses, self._groups
        stopped = np.zeros(len(rows), bool)
        for i in np.flatnonzero(groups.is_followed[h.group[rows]]).tolist():
            group, member = groups[int(h.group[rows[i]])], int(h.member[rows[i]])
            if group.phrases:
                group.phrases.write(member, int(tokens[i]))
            if group.texts:
                group.texts[member].push((int(tokens[i]),))
                stopped[i] = group.texts[member].stopped
        return stopped

    def branch(self, source: Rows, target: Rows, tokens: NDArray[np.int64]) -> Rows:
        """Row target[i] [B] is what row source[i], of the same request, was, with tokens[i] written.

        The survivors of one request come together. Returns the targets whose text now holds a stop string.
        """
        h, groups = self._hypotheses, self._groups
        followed = groups.is_followed[h.group[target]]
        source, target, tokens = source[followed], target[followed], tokens[followed]
        numbers = h.group[target]
        for number in np.unique(numbers).tolist():
            group, own = groups[number], numbers == number
            parents, children = h.member[source[own]].tolist(), h.member[target[own]].tolist()
            if group.phrases:
                group.phrases.branch(parents, children)
            if group.texts:
                copies = [group.texts[parent].copy() for parent in parents]
                for child, text in zip(children, copies, strict=True):
                    group.texts[child] = text
        return target[self.write(target, tokens)]
