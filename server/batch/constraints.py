"""Phrases that an output must contain: what a hypothesis still has to write, and which of its continuations may live.

Constrained beam search with dynamic beam allocation (Post & Vilar 2018): continuations compete with those that have written as
much of the phrases (a *bank*), and the banks share the beam. One rule is added, and it makes sure that every output contains
every phrase: a continuation lives only if what it would still have to write fits into the tokens that are left. The token that
goes on with a phrase always does, so some continuation always lives.

Shapes: B rows, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Phrase = tuple[int, ...]
State = tuple[int, ...]
"""For each phrase how many of its tokens the last ones of a hypothesis are; all of them once it is met."""

_STATES_KEPT = 256
"""States of one request whose successors are remembered."""


class RequiredPhrases:
    """How far each hypothesis of one request has come.

    A phrase is met when its tokens stand in the output next to each other, wherever, once. Each is searched for as Knuth,
    Morris & Pratt (1977) do.

    Args:
        phrases: not empty, none of them empty.
        members: hypotheses of the request.
    """

    def __init__(self, phrases: Sequence[Phrase], members: int) -> None:
        self._phrases = tuple(phrases)
        self._borders = [_borders(phrase) for phrase in phrases]
        self._tokens = sorted({token for phrase in phrases for token in phrase})
        self._member: list[State] = [(0,) * len(self._phrases)] * members
        self._follows: dict[State, tuple[dict[int, State], State]] = {}
        self.total = sum(map(len, phrases))
        """Tokens of all phrases."""

    def write(self, member: int, token: int) -> None:
        """A member writes its next token."""
        self._member[member] = self._after(self._member[member], token)

    def branch(self, parents: Sequence[int], children: Sequence[int]) -> None:
        """Member children[i] is from now on what parents[i] was."""
        states = [self._member[parent] for parent in parents]
        for child, state in zip(children, states, strict=True):
            self._member[child] = state

    def need(self, member: int) -> int:
        """Tokens that certainly suffice to complete what a member has not met; 0 when it has met all."""
        return self._need(self._member[member])

    def needs_after(self, member: int, tokens: Sequence[int]) -> list[int]:
        """``need`` after each of these tokens."""
        known, otherwise = self._following(self._member[member])
        other = self._need(otherwise)
        return [self._need(known[token]) if token in known else other for token in tokens]

    def advancing(self, member: int) -> list[int]:
        """The tokens that go on with a phrase that is not met: for each phrase its next one."""
        pairs = zip(self._phrases, self._member[member], strict=True)
        return sorted({phrase[at] for phrase, at in pairs if at < len(phrase)})

    def _need(self, state: State) -> int:
        unmet = [(len(phrase), at) for phrase, at in zip(self._phrases, state, strict=True) if at < len(phrase)]
        # Complete the phrase that is furthest, then write the others in turn.
        return sum(length for length, _ in unmet) - max((at for _, at in unmet), default=0)

    def _after(self, state: State, token: int) -> State:
        known, otherwise = self._following(state)
        return known.get(token, otherwise)

    def _following(self, state: State) -> tuple[dict[int, State], State]:
        """The state after each token that occurs in a phrase, and after any other."""
        found = self._follows.get(state)
        if found is None:
            found = {token: self._advance(state, token) for token in self._tokens}, self._advance(state, None)
            if len(self._follows) == _STATES_KEPT:
                self._follows.clear()
            self._follows[state] = found
        return found

    def _advance(self, state: State, token: int | None) -> State:
        return tuple(
            at if at == len(phrase) else _advance(phrase, borders, at, token)
            for phrase, borders, at in zip(self._phrases, self._borders, state, strict=True)
        )


def _borders(phrase: Phrase) -> list[int]:
    """For each n: the longest proper beginning of phrase[:n] that is also its end."""
    borders = [0, 0]
    for token in phrase[1:]:
        borders.append(_advance(phrase, borders, borders[-1], token))
    return borders


def _advance(phrase: Phrase, borders: Sequence[int], at: int, token: int | None) -> int:
    """How many tokens of ``phrase`` stand at the end of a text that had ``at`` of them, after its next token."""
    while at and phrase[at] != token:
        at = borders[at]
    return at + (phrase[at] == token)


def order_by_banks(scores: NDArray[np.float32], banks: NDArray[np.int64]) -> NDArray[np.intp]:
    """The order in which continuations take places: the best of each bank, then the second best of each, and so on.

    Args:
        scores: [G, N]; -inf: impossible, comes last. banks: [G, N]; of equal rank, the higher bank comes first.
    """
    best_first = np.argsort(-scores, axis=1, kind="stable")
    by_bank = np.argsort(np.take_along_axis(banks, best_first, axis=1), axis=1, kind="stable")
    candidate = np.take_along_axis(best_first, by_bank, axis=1)
    bank = np.take_along_axis(banks, candidate, axis=1)
    place = np.broadcast_to(np.arange(bank.shape[1]), bank.shape)
    begins = np.zeros(bank.shape, np.intp)
    begins[:, 1:] = np.where(bank[:, 1:] != bank[:, :-1], place[:, 1:], 0)
    rank = place - np.maximum.accumulate(begins, axis=1)
    impossible = np.isneginf(np.take_along_axis(scores, candidate, axis=1))
    return np.take_along_axis(candidate, np.lexsort((-bank, rank, impossible), axis=1), axis=1)
