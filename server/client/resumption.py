"""Going on with a stream that broke: the same call is made again, and what the caller has already is left out.

That works because the same request gives the same output. Where it did not, to the letter, the stream is not stitched together.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import grpc

from server.client.channel import GONE
from server.client.errors import CallError
from server.client.types import Options, StreamedGeneration, StreamedText, Token

_MOST_RESUMPTIONS = 3
_SHORTEST_PAUSE = 0.1
_SEEDS = 2**53


def reproducible(options: Options | None) -> Options | None:
    """With a seed where there is sampling without one: drawn here, so that a second call draws the same."""
    if options is None or options.sampling is None or options.sampling.seed is not None:
        return options
    return replace(options, sampling=replace(options.sampling, seed=random.randrange(_SEEDS)))


class Resumption:
    """What a caller has of one stream.

    Args:
        deadline: when the stream must have ended, by the clock whose time ``pause_before_retry`` is told.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._resumed = 0
        self._text: defaultdict[tuple[int, int], str] = defaultdict(str)
        self._tokens: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._ended: set[int] = set()
        self._text_again: defaultdict[tuple[int, int], str] = defaultdict(str)
        self._tokens_again: defaultdict[tuple[int, int], int] = defaultdict(int)

    def pause_before_retry(self, error: CallError, now: float) -> float:
        """Seconds after which to call again. Raises the error when that makes no sense."""
        pause = max(_SHORTEST_PAUSE, error.retry_after or 0.0) * random.uniform(1.0, 1.5)  # not all at once
        begun = bool(self._text or self._ended)  # before that, gRPC itself has tried again
        if error.code not in GONE or not begun or self._resumed == _MOST_RESUMPTIONS:
            raise error
        if now + pause >= self._deadline:
            raise error
        self._resumed += 1
        self._text_again.clear()
        self._tokens_again.clear()
        return pause

    def news(self, event: StreamedText | StreamedGeneration) -> StreamedText | StreamedGeneration | None:
        """The part of an event that the caller does not have yet; None for nothing.

        Raises:
            CallError: when the text of the second call is not that of the first.
        """
        if isinstance(event, StreamedGeneration):
            if event.input in self._ended:
                return None
            self._ended.add(event.input)
            return event
        key = (event.input, event.hypothesis)
        if not self._resumed:
            self._text[key] += event.text
            self._tokens[key] += len(event.tokens)
            return event
        self._text_again[key] += event.text
        self._tokens_again[key] += len(event.tokens)
        had, has = self._text[key], self._text_again[key]
        if not has.startswith(had[: len(has)]):
            raise CallError(grpc.StatusCode.ABORTED, "the stream broke, and a second call gave another text")
        new_tokens = self._new_tokens(key, event.tokens)
        if len(has) <= len(had) and not new_tokens:
            return None
        self._text[key] = max(had, has, key=len)
        return replace(event, text=has[len(had) :], tokens=new_tokens)

    def _new_tokens(self, key: tuple[int, int], tokens: tuple[Token, ...]) -> tuple[Token, ...]:
        new = max(0, min(len(tokens), self._tokens_again[key] - self._tokens[key]))
        self._tokens[key] += new
        return tokens[len(tokens) - new :]
