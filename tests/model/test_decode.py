"""The reference decoder, against the full forward pass, exhaustive enumeration and distributions written by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from model import decode
from model.decode import BOS, EOS, beam_search, greedy, greedy_batch, sample, score
from model.transformer import Transformer
from tests import tiny

FAMILIES = ["encoder_decoder", "decoder_only"]
SOURCE = [7, 30, 12, 25, 2]
PROMPT = [7, 30, 12, 25]


def forward(model: Transformer, input_ids: Sequence[int], target: Sequence[int]) -> Tensor:
    """Log-probabilities [T + 1, V] of what follows every prefix of ``target``, from one full forward pass."""
    with torch.no_grad():
        if model.config.has_encoder:
            source, lengths = torch.tensor([list(input_ids)]), torch.tensor([len(input_ids)])
            logits = model(source, lengths, torch.tensor([[BOS, *target]]))[0]
        else:
            logits = model(torch.tensor([[*input_ids, *target]]))[0, len(input_ids) - 1 :]
    return logits.log_softmax(-1)


# On a real model


@pytest.mark.parametrize("name", [name for name, config in tiny.VARIANTS.items() if config.has_decoder])
@pytest.mark.parametrize("min_tokens", [0, 15])
def test_greedy_takes_the_argmax_of_the_full_forward_pass(name: str, min_tokens: int) -> None:
    model = tiny.model(tiny.VARIANTS[name])
    found = greedy(model, SOURCE, max_tokens=18, min_tokens=min_tokens)
    wanted = forward(model, SOURCE, found.tokens)[:-1]
    wanted[:min_tokens, EOS] = -math.inf
    assert found.tokens == wanted.argmax(-1).tolist()
    assert found.log_probabilities == pytest.approx(wanted.amax(-1).tolist(), abs=1e-4)
    assert found.tokens[-1] == EOS or len(found.tokens) == 18
    assert EOS not in found.tokens[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_beam_is_greedy(family: str) -> None:
    model = tiny.model(tiny.shape(family))
    rng = random.Random(0)
    for _ in range(8):
        source = tiny.token_ids(rng, rng.randint(1, 20))
        lengths = {"max_tokens": rng.randint(1, 18), "min_tokens": rng.choice([0, 1, 6])}
        lengths["min_tokens"] = min(lengths.values())
        (found,) = beam_search(model, source, beams=1, **lengths)
        wanted = greedy(model, source, **lengths)
        # A greedy search goes on until the best token is the end; a beam of one is the same.
        assert found.tokens == wanted.tokens
        assert found.score == pytest.approx(wanted.score, abs=1e-5)


def test_a_beam_wide_enough_finds_everything_in_order() -> None:
    model = tiny.model(tiny.shape("encoder_decoder", vocab_size=6))
    source, longest, vocabulary = [5, 4, 5, 2], 4, [0, 1, 3, 4, 5]
    totals: dict[tuple[int, ...], float] = {}
    for length in range(longest + 1):
        for begin in itertools.product(vocabulary, repeat=length):
            whole = (*begin, EOS) if length < longest else begin
            log_p = forward(model, source, whole)
            totals[whole] = sum(float(log_p[t, token]) for t, token in enumerate(whole))
    assert sum(map(math.exp, totals.values())) == pytest.approx(1.0, abs=1e-4)
    for length_penalty in (0.0, 0.6, 1.0, 2.0):
        found = beam_search(model, source, beams=1000, max_tokens=longest, length_penalty=length_penalty)
        scores = {tokens: total / len(tokens) ** length_penalty for tokens, total in totals.items()}
        assert {tuple(h.tokens): pytest.approx(h.score, abs=1e-4) for h in found} == scores
        assert tuple(found[0].tokens) == max(scores, key=scores.__getitem__)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hypothesis_scores_what_the_full_forward_pass_says(family: str) -> None:
    """So a beam's cache is that of its own parent, whichever beams have changed places."""
    model, rng = tiny.model(tiny.shape(family)), random.Random(1)
    for _ in range(6):
        source = tiny.token_ids(rng, rng.randint(1, 20))
        beams = rng.choice([2, 5])
        found = beam_search(model, source, beams=beams, max_tokens=14, patience=2.0, length_penalty=0.7)
        assert len({tuple(h.tokens) for h in found}) == len(found) == beams
        for hypothesis in [*found, sample(model, source, max_tokens=14, seed=3, temperature=1.5)]:
            log_p = forward(model, source, hypothesis.tokens)[:-1]
            wanted = log_p[torch.arange(len(hypothesis.tokens)), hypothesis.tokens].tolist()
            assert hypothesis.log_probabilities == pytest.approx(wanted, abs=1e-4)
            assert score(model, source, hypothesis.tokens) == pytest.approx(wanted, abs=1e-4)
        for hypothesis in found:
            assert hypothesis.score == pytest.approx(hypothesis.log_probability / len(hypothesis.tokens) ** 0.7, abs=1e-5)


def test_a_batch_of_ragged_sources_gives_what_each_gives_alone() -> None:
    model, rng = tiny.model(tiny.shape("encoder_decoder")), random.Random(2)
    sources = [tiny.token_ids(rng, length) for length in (1, 20, 3, 11, 24, 6, 2)]
    wanted = [greedy(model, source, max_tokens=12).text_tokens for source in sources]
    assert greedy_batch(model, sources, max_tokens=12, batch_size=3) == wanted
    prompts = [tiny.token_ids(rng, 5) for _ in range(4)]
    model = tiny.model(tiny.shape("decoder_only"))
    wanted = [greedy(model, prompt, max_tokens=12).text_tokens for prompt in prompts]
    assert greedy_batch(model, prompts, max_tokens=12) == wanted


# On distributions written by hand

A, B, C = 3, 4, 5
"""The tokens beside the end, of a vocabulary of six."""
Distribution = dict[int, float]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[tuple[int, ...]], Distribution]], Transformer]:
    """Makes the decoder read its probabilities from a function of the tokens so far."""

    class Scripted:
        def __init__(self, follows: Callable[[tuple[int, ...]], Distribution], input_ids: Sequence[int]) -> None:
            self.follows, self.written = follows, [()]

        def start_logits(self) -> Tensor:
            p = [[self.follows(tokens).get(token, 0.0) for token in range(6)] for tokens in self.written]
            return torch.tensor(p).log()

        def step_logits(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
            self.written = [(*self.written[parent], token) for parent, token in zip(parents, tokens, strict=True)]
            return self.start_logits()

    monkeypatch.setattr(decode, "Incremental", Scripted)
    return lambda follows: follows  # type: ignore[return-value]


def test_an_end_counts_only_among_the_first_beams(scripted) -> None:
    def follows(tokens: tuple[int, ...]) -> Distribution:
        return {A: 0.5, B: 0.3, EOS: 0.2} if not tokens else {EOS: 1.0}

    found = beam_search(scripted(follows), [], beams=2, max_tokens=3, length_penalty=0.0)
    assert [h.tokens for h in found] == [[A, EOS], [B, EOS]]  # although the end alone has 0.2
    found = beam_search(scripted(follows), [], beams=3, max_tokens=3, length_penalty=0.0)
    assert [h.tokens for h in found] == [[A, EOS], [B, EOS], [EOS]]


def test_an_end_takes_no_beams_place(scripted) -> None:
    def follows(tokens: tuple[int, ...]) -> Distribution:
        return {(): {EOS: 0.4, A: 0.3, B: 0.2, C: 0.1}}.get(tokens, {EOS: 1.0})

    found = beam_search(scripted(follows), [], beams=2, max_tokens=3, patience=1.5, length_penalty=0.0)
    assert [h.tokens for h in found] == [[EOS], [A, EOS]]
    # With room for three, the second best beam is there too: [EOS] did not push it out.
    found = beam_search(scripted(follows), [], beams=2, max_tokens=3, patience=1.5, length_penalty=3.0)
    assert [h.tokens for h in found] == [[A, EOS], [B, EOS]]


def test_patience_decides_how_many_ends_are_enough(scripted) -> None:
    def follows(tokens: tuple[int, ...]) -> Distribution:
        # At every length one hypothesis ends; the later, the better per token.
        return {A: 0.6, EOS: 0.4}

    for patience, ends in ((0.1, 1), (0.5, 1), (0.8, 2), (1.0, 2), (1.5, 3), (3.0, 6)):
        found = beam_search(scripted(follows), [], beams=2, max_tokens=20, patience=patience)
        assert len(found) == min(2, ends)
        assert found[0].tokens == [A] * (ends - 1) + [EOS]


def test_the_length_penalty_decides_between_short_and_long(scripted) -> None:
    def follows(tokens: tuple[int, ...]) -> Distribution:
        return {(): {EOS: 0.5, A: 0.5}, (A,): {B: 0.9, EOS: 0.1}}.get(tokens, {EOS: 1.0})

    def best(length_penalty: float) -> list[int]:
        return beam_search(scripted(follows), [], beams=2, max_tokens=5, patience=2.0, length_penalty=length_penalty)[0].tokens

    assert best(0.0) == [EOS]  # log 0.5 against log 0.45
    assert best(1.0) == [A, B, EOS]
    found = beam_search(scripted(follows), [], beams=2, max_tokens=5, patience=2.0, length_penalty=1.0)
    assert found[0].score == pytest.approx(math.log(0.45) / 3)


def test_the_limits_on_length(scripted) -> None:
    def follows(tokens: tuple[int, ...]) -> Distribution:
        return {EOS: 0.9, A: 0.06, B: 0.04}

    for minimum, maximum in ((0, 3), (2, 3), (3, 3), (1, 1)):
        lengths = {"min_tokens": minimum, "max_tokens": maximum}
        whole = beam_search(scripted(follows), [], beams=3, **lengths)
        whole += [greedy(scripted(follows), [], **lengths)]
        whole += [sample(scripted(follows), [], seed=seed, **lengths) for seed in range(20)]
        for hypothesis in whole:
            # The end may be the token after the first min_tokens, no earlier; max_tokens counts it.
            assert min(minimum + 1, maximum) <= len(hypothesis.tokens) <= maximum
            assert EOS not in hypothesis.tokens[:minimum]
    at_the_limit = beam_search(scripted(follows), [], beams=2, min_tokens=2, max_tokens=2)
    assert at_the_limit[0].tokens == [A, A]
    assert at_the_limit[0].text_tokens == [A, A]


def test_a_hopeless_beam_is_no_hypothesis(scripted) -> None:
    found = beam_search(scripted(lambda tokens: {A: 1.0} if len(tokens) < 2 else {EOS: 1.0}), [], beams=4, max_tokens=9)
    assert [h.tokens for h in found] == [[A, A, EOS]]


# Sampling

FIRST = {EOS: 0.05, A: 0.4, B: 0.25, C: 0.2, 0: 0.06, 1: 0.04}
CRITICAL = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}
"""Chi-square at p = 0.001, by degrees of freedom."""


def chi_square(counts: Counter[int], wanted: Distribution) -> None:
    draws = sum(counts.values())
    assert set(counts) == set(wanted)
    statistic = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in wanted.items())
    assert statistic < CRITICAL[len(wanted) - 1]


def normalised(distribution: Distribution) -> Distribution:
    total = sum(distribution.values())
    return {token: p / total for token, p in distribution.items()}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, FIRST),
        ({"temperature": 2.0}, {token: p**0.5 for token, p in FIRST.items()}),
        ({"temperature": 0.5}, {token: p**2 for token, p in FIRST.items()}),
        ({"top_k": 2}, {A: 0.4, B: 0.25}),
        ({"top_k": 50}, FIRST),
        ({"top_p": 0.65001}, {A: 0.4, B: 0.25, C: 0.2}),  # B alone does not reach it
        ({"top_p": 0.64}, {A: 0.4, B: 0.25}),
        ({"top_k": 3, "top_p": 0.7}, {A: 0.4, B: 0.25}),  # 0.65 of 0.85 reach it
        ({"min_tokens": 1}, {token: p for token, p in FIRST.items() if token != EOS}),
    ],
)
def test_samples_follow_the_distribution(scripted, options, wanted) -> None:
    def follows(tokens: tuple[int, ...]) -> Distribution:
        return FIRST

    found = [sample(scripted(follows), [], max_tokens=1, seed=seed, **options) for seed in range(2000)]
    chi_square(Counter(h.tokens[0] for h in found), normalised(wanted))
    found = [sample(scripted(follows), [], max_tokens=1, seed=7, sample_index=i, **options) for i in range(2000)]
    chi_square(Counter(h.tokens[0] for h in found), normalised(wanted))


def test_each_step_draws_anew(scripted) -> None:
    def follows(tokens: tuple[int, ...]) -> Distribution:
        return {A: 0.5, B: 0.5}

    pairs = Counter(tuple(sample(scripted(follows), [], max_tokens=2, seed=seed).tokens) for seed in range(2000))
    codes = {(A, A): 0, (A, B): 1, (B, A): 2, (B, B): 3}
    chi_square(Counter({codes[pair]: count for pair, count in pairs.items()}), dict.fromkeys(range(4), 0.25))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0.01}])
def test_sampling_with_no_choice_is_greedy(options) -> None:
    model = tiny.model(tiny.shape("encoder_decoder"))
    for seed in range(5):
        found = sample(model, SOURCE, max_tokens=12, seed=seed, **options)
        assert found.tokens == greedy(model, SOURCE, max_tokens=12).tokens


def test_a_seed_says_everything() -> None:
    model = tiny.model(tiny.shape("decoder_only"))
    runs = [
        [sample(model, PROMPT, max_tokens=12, seed=seed, sample_index=i).tokens for seed in (0, 1, 2**64 - 1) for i in (0, 1)]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(map(tuple, runs[0]))) == 6
    # A shorter limit cuts the same text.
    whole = sample(model, PROMPT, max_tokens=12, seed=5).tokens
    assert sample(model, PROMPT, max_tokens=4, seed=5).tokens == whole[:4]
