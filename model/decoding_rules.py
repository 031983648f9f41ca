"""What a caller may ask of an output beside the search itself, in the words of the reference decoder: one hypothesis, one step.

At each step, from the logits of what comes next:

1. repetition, frequency and presence penalties, then bias, change logits; log-softmax makes them the *adjusted* distribution;
2. what is forbidden (suppressed tokens, an end that comes too early, n-grams that would repeat) gets probability 0, and the
   others keep theirs;
3. tokens are chosen, and hypotheses ranked, by adjusted log-probabilities; reported are the model's *own*.

A forced prefix is not chosen, so nothing is applied to it; penalties count it as written.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, full_like


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The defaults ask for nothing."""

    end: int = 2
    prefix: Sequence[int] = ()
    """Every output begins with these tokens."""
    alternative: int | None = None
    """The token after the prefix is not chosen but this one of the possible ones, by falling probability; 0 is the best."""
    min_tokens: int = 0
    """Fewest tokens before one that ends the text."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens already written, multiplies negative ones (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was written."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token already written."""
    token_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to logits."""
    no_repeat_ngram: int = 0
    """No sequence of this many tokens is written twice, unless nothing else is left; 0: no such rule."""
    suppressed_tokens: Sequence[int] = ()
    stop_tokens: Sequence[int] = ()
    """Each ends the text as the end-of-text token does."""
    stop_strings: Sequence[str] = ()
    """The text ends with the token that completes one of them."""
    decode: Callable[[Sequence[int]], str] | None = None
    """The text of tokens; for stop strings."""
    required_phrases: Sequence[Sequence[int]] = ()
    """Every output contains the tokens of each, next to each other; for beam search."""

    def distributions(self, logits: Tensor, written: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [V] of the token after ``written``: the model's own, and the adjusted ones."""
        own = logits.float().log_softmax(-1)
        if len(written) < len(self.prefix):
            forced = full_like(own, -math.inf)
            token = self.prefix[len(written)]
            forced[token] = own[token]
            return own, forced
        changed = logits.float().clone()
        for token in set(written):
            value, count = float(changed[token]), written.count(token)
            value = value / self.repetition_penalty if value > 0 else value * self.repetition_penalty
            changed[token] = value - self.frequency_penalty * count - self.presence_penalty
        for token, gain in self.token_bias.items():
            changed[token] += gain
        adjusted = changed.log_softmax(-1)
        forbidden = set(self.suppressed_tokens)
        if len(written) < self.min_tokens or self.need(written):
            forbidden |= {self.end, *self.stop_tokens}
        repeating = self._repeating(written)
        if len(forbidden | repeating) < len(adjusted):
            forbidden |= repeating
        for token in forbidden:
            adjusted[token] = -math.inf
        if self.alternative is not None and len(written) == len(self.prefix):
            token = int(adjusted.sort(descending=True, stable=True).indices[self.alternative])
            only = full_like(adjusted, -math.inf)
            only[token] = adjusted[token]
            return own, only
        return own, adjusted

    def _repeating(self, written: Sequence[int]) -> set[int]:
        """The tokens that would complete an n-gram for the second time."""
        size = self.no_repeat_ngram
        if not 0 < size <= len(written):
            return set()
        ngrams = {tuple(written[i : i + size]) for i in range(len(written) - size + 1)}
        last = tuple(written[len(written) - size + 1 :])
        return {ngram[-1] for ngram in ngrams if ngram[:-1] == last}

    def _unmet(self, written: Sequence[int]) -> list[tuple[Sequence[int], int]]:
        """Each required phrase that is not there yet, and how many of its tokens the last ones are."""
        text = tuple(written)
        unmet = list[tuple[Sequence[int], int]]()
        for phrase in map(tuple, self.required_phrases):
            if not any(text[i : i + len(phrase)] == phrase for i in range(len(text))):
                begun = max(n for n in range(len(phrase)) if n <= len(text) and text[len(text) - n :] == phrase[:n])
                unmet.append((phrase, begun))
        return unmet

    def need(self, written: Sequence[int]) -> int:
        """Tokens that suffice for the required phrases that are not there yet: end the one begun, then write the others."""
        unmet = self._unmet(written)
        return sum(len(phrase) for phrase, _ in unmet) - max((begun for _, begun in unmet), default=0)

    def advancing(self, written: Sequence[int]) -> list[int]:
        """The next token of each required phrase that is not there yet."""
        return sorted({phrase[begun] for phrase, begun in self._unmet(written)})

    def ends(self, written: Sequence[int]) -> bool:
        """The last token is one that ends the text."""
        return len(written) > len(self.prefix) and written[-1] in (self.end, *self.stop_tokens)

    def stop(self, written: Sequence[int]) -> int | None:
        """Where in the text the stop string begins that the last token completes; the first one, where it completes several."""
        if not self.stop_strings or len(written) <= max(self.min_tokens, len(self.prefix)):
            return None
        assert self.decode is not None
        # The bytes of an unfinished character decode to U+FFFD: they are not text yet.
        before, text = (self.decode(tokens).removesuffix("\ufffd") for tokens in (written[:-1], written))
        begins = [text.find(stop, max(0, len(before) - len(stop) + 1)) for stop in self.stop_strings]
        return min((begin for begin in begins if begin >= 0), default=None)
