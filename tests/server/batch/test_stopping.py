"""Stop strings found token by token, against a look at the whole text."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from model.decoding_rules import Rules
from model.tokenizer import Tokenizer
from server.batch.stopping import StoppingText

TOKENIZER = Tokenizer.train_bpe(["abab aab é 😀 abba"] * 4, 4 + 256 + 20)
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | st.sampled_from(TOKENIZER.encode_text("abab aab é😀ba")), max_size=30)
STRINGS = st.lists(st.text("ab é😀", min_size=1, max_size=5), min_size=1, max_size=3)


@given(IDS, STRINGS, st.integers(0, 8), st.lists(st.integers(4, 300), max_size=3))
@example([TOKENIZER.encode_text(letter)[0] for letter in "aba"], ["abb", "b"], 2, [])  # "b" is held back, but came too early
def test_text_ends_at_the_first_stop_that_counts(ids, strings, quiet, stop_tokens) -> None:
    rules = Rules(min_tokens=quiet, stop_strings=strings, stop_tokens=stop_tokens, decode=TOKENIZER.decode)
    stopping = StoppingText(TOKENIZER.stream(), strings, stop_tokens, quiet=quiet)
    shown, wanted = "", None
    for n, token in enumerate(ids, 1):
        if n > quiet and token in stop_tokens:
            wanted = TOKENIZER.decode(ids[: n - 1])
        elif (begin := rules.stop(ids[:n])) is not None:
            wanted = TOKENIZER.decode(ids[:n])[:begin]
        assert not stopping.stopped
        twin = stopping.copy()
        shown += twin.push((token,))
        assert twin.stopped == (wanted is not None)
        stopping.push((token,))  # continues by itself, as another hypothesis would
        stopping = twin
        if wanted is not None:
            break
    assert shown + stopping.push(ids[:3] if wanted is not None else ()) + stopping.flush() == (
        TOKENIZER.decode(ids) if wanted is None else wanted
    )


@given(IDS, STRINGS)
def test_what_is_shown_early_is_never_taken_back(ids, strings) -> None:
    """And no more is held back than may become a stop string."""
    stopping, shown = StoppingText(TOKENIZER.stream(), strings, quiet=0), ""
    for n, token in enumerate(ids, 1):
        shown += stopping.push((token,))
        if stopping.stopped:
            break
        text = TOKENIZER.decode(ids[:n]).removesuffix("\ufffd")
        assert text.startswith(shown)
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in strings)
