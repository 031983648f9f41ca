"""Where a text stops: at a stop token, or at the first stop string, wherever token boundaries lie. No clock, no I/O.

The engine asks when a hypothesis has to end; the edge asks, of the same tokens, which text may already be shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, Self


class TextStream(Protocol):
    """Decodes ids as they come, as ``model.tokenizer.TextStream``."""

    def push(self, ids: Iterable[int]) -> str: ...
    def flush(self) -> str: ...
    def copy(self) -> Self: ...


class StoppingText:
    """A text written token by token, up to its first stop, which is not part of it.

    Text that may still become a stop string is held back.

    Args:
        text: decodes the tokens.
        strings: none of them empty.
        quiet: what the first ``quiet`` tokens write is no stop.
    """

    def __init__(self, text: TextStream, strings: Sequence[str], tokens: Sequence[int] = (), *, quiet: int) -> None:
        self._text, self._strings, self._stop_tokens, self._quiet = text, tuple(strings), tuple(tokens), quiet
        self._tokens = 0
        self._held = ""
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become final. Tokens after a stop leave nothing behind."""
        shown = []
        for token in ids:
            self._tokens += 1
            if token in self._stop_tokens and self._tokens > self._quiet:
                shown.append(self.flush())
                self.stopped = True
            elif not self.stopped:
                shown.append(self._look(self._text.push((token,))))
        return "".join(shown)

    def flush(self) -> str:
        """What was held back, at the end."""
        rest = "" if self.stopped else self._held + self._text.flush()
        self._held = ""
        return rest

    def copy(self) -> StoppingText:
        """The same text, from here on written by itself."""
        twin = StoppingText(self._text.copy(), self._strings, self._stop_tokens, quiet=self._quiet)
        twin._tokens, twin._held, twin.stopped = self._tokens, self._held, self.stopped
        return twin

    def _look(self, new: str) -> str:
        text = self._held + new
        if self._tokens > self._quiet:
            first = len(self._held) + 1  # what is found must end in what is new
            found = [at for at in (text.find(stop, max(0, first - len(stop))) for stop in self._strings) if at >= 0]
            if found:
                self.stopped = True
                self._held = ""
                return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._strings), default=0)
        final = len(text) - held
        self._held = text[final:]
        return text[:final]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` and is not all of it."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
