"""The trainer's tokens per second beside a plain ``torch.nn.Transformer`` of the same configuration, in one run.

    python -m tests.bench.training

Both sides learn from the same batches with Adam, label smoothing, gradient clipping and dropout in the same places, and are
taken in turn. The plain side is what one writes first: ``nn.Transformer``, ``nn.Embedding``, ``F.cross_entropy`` on all logits,
in fp32 and under bf16 autocast; the better of the two is what ours is held against. A token is a label: a target position that
is not padding.
"""

from __future__ import annotations

import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from model.batches import IGNORE, Batch, Epoch, Example, plan_batches
from model.config import ModelConfig
from model.device import PRECISIONS, describe_machine, keep_freed_memory, pick_device
from model.objective import TrainingLoss
from model.optim import make_optimizer
from model.recipe import load_recipe
from model.recipe_sections import TrainingRecipe
from model.transformer import Transformer, sinusoids

VOCABULARY = 9_712
SMOOTHING = 0.1

Update = Callable[[Batch], None]


class PlainTransformer(nn.Module):
    """``nn.Transformer`` with tied embeddings: logits of whole targets."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transformer = nn.Transformer(
            d_model=config.d_model,
            nhead=config.heads,
            num_encoder_layers=config.encoder_layers,
            num_decoder_layers=config.decoder_layers,
            dim_feedforward=config.d_ff,
            dropout=config.dropout,
            batch_first=True,
        )
        for module in self.transformer.modules():  # nn.Transformer drops attention weights and activations as well
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = config.attention_dropout
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = config.activation_dropout
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.register_buffer("positions", sinusoids(config.max_source_length, config.d_model))
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(x + self.positions[: tokens.size(1)])

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        padding = torch.arange(source.size(1), device=source.device) >= lengths[:, None]  # [B, S]
        causal = nn.Transformer.generate_square_subsequent_mask(target.size(1), device=source.device).isinf()
        states = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return F.linear(states, self.embedding.weight)


def plain_update(config: ModelConfig, dtype: torch.dtype, settings: TrainingRecipe, device: torch.device) -> Update:
    torch.manual_seed(1)
    model = PlainTransformer(config).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=settings.betas)

    def update(batch: Batch) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(*batch.inputs)  # [B, T, V]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), label_smoothing=SMOOTHING)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def our_update(config: ModelConfig, dtype: torch.dtype, settings: TrainingRecipe, device: torch.device) -> Update:
    """What ``model.trainer`` does for each batch."""
    torch.manual_seed(1)
    model = Transformer(config).to(device).train()
    optimizer = make_optimizer(model, settings)
    loss_of = TrainingLoss(model, SMOOTHING, dtype)

    def update(batch: Batch) -> None:
        loss = loss_of(batch) / int((batch.labels != IGNORE).sum())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def made_up_batches(count: int, batch_tokens: int) -> list[Batch]:
    """Sentences as long as those of Multi30k (about 14 tokens a side, 8 to 25), of random words."""
    random = Random(0)

    def sentence() -> list[int]:
        length = min(max(round(random.lognormvariate(2.6, 0.3)), 5), 40)
        return [random.randrange(4, VOCABULARY) for _ in range(length)]

    examples = [Example([*sentence(), 2], sentence()) for _ in range(400 * count)]
    epoch = Epoch(examples, plan_batches(examples, batch_tokens, random), "sequence_to_sequence")
    return [epoch[i] for i in range(count)]


def main(
    batches: Annotated[int, typer.Option(min=1, help="Updates in a turn.")] = 6,
    repetitions: Annotated[int, typer.Option(min=1, help="Turns of each side; medians count.")] = 5,
    batch_tokens: Annotated[int, typer.Option(min=64)] = 4_096,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")] = None,
) -> None:
    """Measure training of the Multi30k configuration (4+4 layers, 128 wide, 9,712 words, dropout 0.3)."""
    device = pick_device("auto")
    keep_freed_memory()
    recipe = load_recipe("multi30k-en-de")
    config, settings = recipe.model_config(VOCABULARY), recipe.training
    work = [batch.to(device) for batch in made_up_batches(batches, batch_tokens)]
    labels = sum(int((batch.labels != IGNORE).sum()) for batch in work)
    sides = {
        f"{name} {precision}": make(config, dtype, settings, device)
        for name, make in (("ours", our_update), ("nn.Transformer", plain_update))
        for precision, dtype in PRECISIONS.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repetitions + 1):  # the first warms up
        for name, update in sides.items():
            begin = time.perf_counter()
            for batch in work:
                update(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                rates[name].append(labels / (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours, plain = (max(value for name, value in medians.items() if name.startswith(side)) for side in ("ours", "nn"))
    table = Table("side", "labels/s", "s an update", title=f"{describe_machine(device)}, PyTorch {torch.__version__}")
    for name, value in medians.items():
        table.add_row(name, f"{value:,.0f}", f"{labels / len(work) / value:.3f}")
    console = Console()
    console.print(table)
    console.print(f"best against best: {ours / plain:.2f}")
    if json_file:
        json_file.write_text(json.dumps({"labels_per_second": medians, "ratio": ours / plain, "runs": rates}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
