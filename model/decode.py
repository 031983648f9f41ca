"""The reference decoder: plain, slow, obviously right.

One input at a time, no padding, no batching across inputs, Python lists for hypotheses. Everything faster (the exported graphs,
the serving engine) is checked against this file, so nothing here is clever.

Shapes: B hypotheses, T target positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from model.alignment import alignment_weights, coverage
from model.attention import KeyValue
from model.decoding_rules import Rules
from model.transformer import Memory, Transformer

BOS, EOS = 1, 2


@dataclass(frozen=True, slots=True)
class Hypothesis:
    tokens: list[int]
    """The end-of-text token included when the model wrote it; the prompt and the start token not."""
    log_probabilities: list[float]
    """Natural logarithm of each token's probability in the model's own distribution."""
    score: float
    """What hypotheses are ranked by: the sum of adjusted log-probabilities / len(tokens) ** length_penalty + coverage."""

    @property
    def log_probability(self) -> float:
        return sum(self.log_probabilities)

    @property
    def text_tokens(self) -> list[int]:
        return self.tokens[:-1] if self.tokens and self.tokens[-1] == EOS else self.tokens


@dataclass(slots=True)
class Incremental:
    """The next-token distributions of some hypotheses of one input, fed token by token through an explicit cache."""

    model: Transformer
    input_ids: Sequence[int]
    memory: Memory | None = field(default=None, init=False)
    cache: list[KeyValue] | None = field(default=None, init=False)

    @torch.no_grad()
    def start_logits(self) -> Tensor:
        """Logits [1, V] of the first output token."""
        device = next(self.model.parameters()).device
        first = list(self.input_ids)
        if self.model.config.has_encoder:
            source = torch.tensor([first], device=device)
            self.memory = self.model.memory(source, torch.tensor([len(first)], device=device))
            first = [BOS]
        states, self.cache = self.model.decode(torch.tensor([first], device=device), self.memory)
        return self.model.logits(states[:, -1])

    @torch.no_grad()
    def step_logits(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Continues hypothesis parents[i] with tokens[i]; logits [B, V] of what comes next."""
        device = next(self.model.parameters()).device
        order = torch.tensor(parents, device=device)
        assert self.cache is not None
        past = [(k[order], v[order]) for k, v in self.cache]
        memory = self.memory
        if memory is not None:
            expanded = [(k.expand(len(parents), -1, -1, -1), v.expand(len(parents), -1, -1, -1)) for k, v in memory.keys_values]
            memory = memory._replace(keys_values=expanded)
        states, self.cache = self.model.decode(torch.tensor(tokens, device=device)[:, None], memory, past)
        return self.model.logits(states[:, -1])


def normalised(log_probability: float, length: int, length_penalty: float) -> float:
    """The score of a hypothesis of ``length`` tokens: longer ones are not punished for having more factors below one."""
    return log_probability / length**length_penalty


def greedy(
    model: Transformer, input_ids: Sequence[int], max_tokens: int, min_tokens: int = 0, rules: Rules | None = None
) -> Hypothesis:
    """The most probable token at every step, until one that ends the text or ``max_tokens``.

    Args:
        rules: what else is asked of the output; ``min_tokens`` is a short form of the rule of that name.
    """
    rules = rules or Rules(min_tokens=min_tokens)
    decoder = Incremental(model, input_ids)
    logits, tokens, scores, total = decoder.start_logits(), list[int](), list[float](), 0.0
    while True:
        own, adjusted = rules.distributions(logits[0], tokens)
        token = int(adjusted.argmax())
        tokens.append(token)
        scores.append(float(own[token]))
        total += float(adjusted[token])
        if rules.ends(tokens) or rules.stop(tokens) is not None or len(tokens) == max_tokens:
            return Hypothesis(tokens, scores, normalised(total, len(tokens), 1.0))
        logits = decoder.step_logits([0], [token])


@dataclass(frozen=True, slots=True)
class _Beam:
    tokens: list[int]
    log_probabilities: list[float]
    total: float
    """Sum of adjusted log-probabilities."""

    def hypothesis(self, length_penalty: float) -> Hypothesis:
        return Hypothesis(self.tokens, self.log_probabilities, normalised(self.total, len(self.tokens), length_penalty))


def beam_search(
    model: Transformer,
    input_ids: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    min_tokens: int = 0,
    length_penalty: float = 1.0,
    coverage_penalty: float = 0.0,
    patience: float = 1.0,
    rules: Rules | None = None,
) -> list[Hypothesis]:
    """Beam search: keep the ``beams`` most probable unfinished hypotheses, collect the finished ones.

    At each step the 2 x beams best continuations are ranked by log-probability. One that ends the text is collected if it ranks
    among the first ``beams``; the first ``beams`` others live on. Of these, one whose text now holds a stop string is collected
    at once, and its place stays empty until the others' continuations fill it. The search stops when round(beams * patience)
    hypotheses are collected ("first come, first served", Kasai et al. 2022), or at ``max_tokens``, where the live ones are
    collected too. With required phrases, continuations are ranked in another way: see ``_rank_by_banks``.

    What is collected is ranked by its score (Wu et al. 2016, equation 14): ``normalised``, and ``coverage_penalty`` times the
    coverage.

    Args:
        rules: what else is asked of the output; ``min_tokens`` is a short form of the rule of that name.

    Returns:
        The ``beams`` best by score, best first.
    """
    rules = rules or Rules(min_tokens=min_tokens)
    decoder = Incremental(model, input_ids)
    logits = decoder.start_logits()
    live, finished = [_Beam([], [], 0.0)], list[Hypothesis]()
    enough = max(1, round(beams * patience))
    for length in range(1, max_tokens + 1):
        both = [rules.distributions(row, b.tokens) for row, b in zip(logits, live, strict=True)]
        own, log_p = torch.stack([one for one, _ in both]), torch.stack([one for _, one in both])  # [B, V]
        totals = torch.tensor([b.total for b in live], device=log_p.device)[:, None] + log_p  # [B, V]
        if rules.required_phrases:
            ranked = _rank_by_banks(totals, live, rules, 2 * beams, max_tokens - length)
        else:
            best, where = totals.flatten().topk(min(2 * beams, totals.numel()))
            ranked = [
                (total, *divmod(index, log_p.size(1))) for total, index in zip(best.tolist(), where.tolist(), strict=True)
            ]
        parents, survivors = list[int](), list[_Beam]()
        for rank, (total, parent, token) in enumerate(ranked):
            if total == -math.inf:
                continue
            tokens = [*live[parent].tokens, token]
            child = _Beam(tokens, [*live[parent].log_probabilities, float(own[parent, token])], total)
            if rules.ends(tokens):
                if rank < beams:
                    finished.append(child.hypothesis(length_penalty))
            elif len(survivors) < beams:
                parents.append(parent)
                survivors.append(child)
        stopped = [rules.stop(b.tokens) is not None for b in survivors]
        finished += [b.hypothesis(length_penalty) for b, stop in zip(survivors, stopped, strict=True) if stop]
        parents = [parent for parent, stop in zip(parents, stopped, strict=True) if not stop]
        live = [b for b, stop in zip(survivors, stopped, strict=True) if not stop]
        if len(finished) >= enough or not live:
            break
        if length == max_tokens:
            finished += [b.hypothesis(length_penalty) for b in live]
            break
        logits = decoder.step_logits(parents, [b.tokens[-1] for b in live])
    if coverage_penalty:
        covered = [coverage(alignment_weights(model, input_ids, h.tokens)) for h in finished]
        finished = [replace(h, score=h.score + coverage_penalty * c) for h, c in zip(finished, covered, strict=True)]
    return sorted(finished, key=lambda h: -h.score)[:beams]


def _rank_by_banks(totals: Tensor, live: Sequence[_Beam], rules: Rules, count: int, left: int) -> list[tuple[float, int, int]]:
    """The first ``count`` continuations (total, parent, token) of a constrained search, in the order in which they take places.

    Those that have written as much of the required phrases are a bank (dynamic beam allocation, Post & Vilar 2018). The best of
    each bank come first, then the second best of each, and so on; of equal rank, the fuller bank first. Candidates are, of each
    hypothesis, the ``count`` best tokens and those that go on with a phrase. One lives only if what it would then still have to
    write fits into the ``left`` tokens after it.
    """
    everything = sum(map(len, rules.required_phrases))
    banks: dict[int, list[tuple[float, int, int]]] = {}
    for parent, (beam, row) in enumerate(zip(live, totals, strict=True)):
        best = row.sort(descending=True, stable=True).indices[:count].tolist()
        for token in {*best, *rules.advancing(beam.tokens)}:
            need = rules.need([*beam.tokens, token])
            if need <= left and row[token] > -math.inf:
                banks.setdefault(everything - need, []).append((float(row[token]), parent, token))
    for bank in banks.values():
        bank.sort(key=lambda candidate: -candidate[0])
    placed = [(rank, -number, one) for number, bank in banks.items() for rank, one in enumerate(bank)]
    return [one for _, _, one in sorted(placed)][:count]


def sample(
    model: Transformer,
    input_ids: Sequence[int],
    *,
    max_tokens: int,
    seed: int,
    sample_index: int = 0,
    min_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    rules: Rules | None = None,
) -> Hypothesis:
    """Ancestral sampling from tokens that are among the ``top_k`` (> 0) most probable, in the smallest set of probability
    ``top_p``, and of at least ``min_p`` times the greatest probability (Nguyen et al. 2024).

    Temperature, then the three sets, act on the adjusted distribution. Step t of sample i draws the t-th uniform number of the
    Philox generator (Salmon et al. 2011) with key (seed, i): the output depends on nothing else. Tokens are laid out on [0, 1)
    by falling probability, ties by id.

    Args:
        rules: what else is asked of the output; ``min_tokens`` is a short form of the rule of that name.
    """
    rules = rules or Rules(min_tokens=min_tokens)
    decoder = Incremental(model, input_ids)
    uniform = np.random.Generator(np.random.Philox(key=np.array([seed, sample_index], dtype=np.uint64)))
    logits, tokens, scores, total = decoder.start_logits(), list[int](), list[float](), 0.0
    while True:
        own, adjusted = rules.distributions(logits[0], tokens)
        row = adjusted.double()
        order = torch.sort(row, descending=True, stable=True).indices
        if top_k:
            order = order[:top_k]
        p = (row[order] / temperature).softmax(0)
        probable = int((p >= min_p * p[0]).sum())
        p = p.cumsum(0)
        keep = min(int((p < top_p).sum()) + 1, probable)  # the token that reaches top_p is in
        p = p[:keep]
        chosen = int((p <= uniform.random() * p[-1]).sum())
        token = int(order[min(chosen, len(p) - 1)])
        tokens.append(token)
        scores.append(float(own[token]))
        total += float(adjusted[token])
        if rules.ends(tokens) or rules.stop(tokens) is not None or len(tokens) == max_tokens:
            return Hypothesis(tokens, scores, normalised(total, len(tokens), 1.0))
        logits = decoder.step_logits([0], [token])


@torch.no_grad()
def score(model: Transformer, input_ids: Sequence[int], target: Sequence[int]) -> list[float]:
    """Log-probability of every token of ``target``, given the input and the tokens before it; one full forward pass."""
    device = next(model.parameters()).device
    wanted = torch.tensor(list(target), device=device)
    if model.config.has_encoder:
        source, lengths = torch.tensor([list(input_ids)], device=device), torch.tensor([len(input_ids)], device=device)
        logits = model(source, lengths, torch.tensor([[BOS, *target[:-1]]], device=device))[0]  # [T, V]
    else:
        whole = torch.tensor([[*input_ids, *target[:-1]]], device=device)
        logits = model(whole)[0, len(input_ids) - 1 :]  # [T, V]
    return logits.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0].tolist()


@torch.no_grad()
def greedy_batch(
    model: Transformer, inputs: Sequence[Sequence[int]], max_tokens: int, batch_size: int = 256
) -> list[list[int]]:
    """Greedy outputs of many inputs, for evaluation during training: batched by padding, so fast but not the reference.

    Sources may be of different lengths; prompts of a decoder-only model must be of equal length within a batch.
    Returns tokens without the end-of-text token.
    """
    device = next(model.parameters()).device
    outputs: list[list[int]] = [[] for _ in inputs]
    for begin in range(0, len(inputs), batch_size):
        batch = [torch.tensor(list(ids), device=device) for ids in inputs[begin : begin + batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        memory, tokens = None, padded
        if model.config.has_encoder:
            memory = model.memory(padded, torch.tensor([len(ids) for ids in batch], device=device))
            tokens = torch.full((len(batch), 1), BOS, device=device)
        cache, rows = None, torch.arange(begin, begin + len(batch), device=device)
        for _ in range(max_tokens):
            states, cache = model.decode(tokens, memory, cache)
            tokens = model.logits(states[:, -1]).argmax(-1, keepdim=True)  # [B, 1]
            live = tokens[:, 0] != EOS
            if not live.all():  # who has ended leaves: one long output is not waited for by a whole batch
                rows, tokens, cache = rows[live], tokens[live], [(k[live], v[live]) for k, v in cache]
                if memory is not None:
                    memory = Memory([(k[live], v[live]) for k, v in memory.keys_values], memory.mask[live])
            for row, token in zip(rows.tolist(), tokens[:, 0].tolist(), strict=True):
                outputs[row].append(token)
            if not len(rows):
                break
    return outputs
