"""A shortlist: the tokens that an output may contain. The output layer computes no others, and they have all the probability.

It holds what stands in the targets of the training corpus, the special tokens, and every single character or byte, so that
anything can still be spelled. It is the same for every input: a shortlist made for each source alone (Jean et al. 2015, section
3.4) is shorter, but a batch then computes the union of its rows' lists.

Shapes: V vocabulary, U tokens of the shortlist.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import metrics
from model.checkpoint import Run, RunError
from model.data import DataError
from model.decode import EOS, greedy_batch
from model.prepare import prepare
from model.recipe import RecipeError, read_recipe
from model.tokenizer import SPECIAL_TOKENS
from model.transformer import Transformer

_WORD_END = "</w>"


def find_shortlist(folder: Path, run: Run, least_count: int) -> list[int]:
    """The ids of what occurs ``least_count`` times in the corpus that ``run`` was trained on, and of what is always in; rising.

    The corpus must still be where the recipe in ``folder`` says.

    Raises:
        RunError: when it is not, or the model has no targets of its own.
    """
    if run.config.family != "encoder_decoder":
        raise RunError(f"{folder}: a shortlist is for encoder-decoders, not for {run.config.family}")
    try:
        prepared = prepare(read_recipe((folder / "recipe.toml").read_text(encoding="utf-8")), run.tokenizer)
    except (DataError, RecipeError, OSError) as error:
        raise RunError(f"{folder}: a shortlist is made from the training corpus: {error}") from error
    before = run.provenance.get("data", {})
    if changed := [name for name, digest in prepared.digests.items() if before.get(name) != digest]:
        raise RunError(f"{folder}: a shortlist is made from the training corpus, but {', '.join(changed)} changed since then")
    counts = Counter(token for example in prepared.plain() for token in example.output)
    pieces = run.tokenizer.pieces(range(run.config.vocab_size))
    letters = {i for i, piece in enumerate(pieces) if len(piece.removesuffix(_WORD_END)) == 1}
    seen = {token for token, count in counts.items() if count >= least_count}
    ids = sorted({*range(len(SPECIAL_TOKENS)), *letters, *seen})
    if len(ids) == run.config.vocab_size:
        raise RunError(f"{folder}: the shortlist would leave out nothing of a vocabulary of {len(ids)}")
    return ids


def restrict(model: Transformer, ids: Sequence[int]) -> Transformer:
    """The same weights, with all the probability on ``ids``: the reference for graphs with a shortlist."""
    outside = torch.ones(model.config.vocab_size, dtype=torch.bool)
    outside[list(ids)] = False
    restricted = copy.copy(model)

    def logits(states: Tensor) -> Tensor:
        return model.logits(states).masked_fill(outside.to(states.device), -torch.inf)

    restricted.logits = logits  # type: ignore[method-assign]
    return restricted


def shortlist_cost(run: Run, ids: Sequence[int]) -> dict[str, Any]:
    """The task's metric on all held-out examples with and without the shortlist: greedy outputs, in PyTorch.

    A certificate holds it as it is.
    """
    longest = run.config.max_source_length
    inputs = [[*run.tokenizer.encode_text(e["source"])[: longest - 1], EOS] for e in run.held_out]
    targets = [example["target"] for example in run.held_out]
    max_tokens = min(run.generation["max_tokens"], run.config.max_target_length)
    whole, short = (greedy_batch(model, inputs, max_tokens) for model in (run.model, restrict(run.model, ids)))
    measure = metrics.TEXT_METRICS[run.task["metric"]]
    before, after = (measure([run.tokenizer.decode(o) for o in side], targets) for side in (whole, short))
    return {
        "tokens": len(ids),
        "vocabulary": run.config.vocab_size,
        "name": f"{run.task['metric']} (greedy)",
        "inputs": len(inputs),
        "whole": before,
        "shortlist": after,
        "loss": before - after,
        "identical_outputs": float(np.mean([a == b for a, b in zip(whole, short, strict=True)])),
    }
