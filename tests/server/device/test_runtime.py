"""ONNX Runtime with its caches, through any sequence of joins, branches and moves, against a full forward pass of each row."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from model.decode import BOS
from model.transformer import Transformer
from server.batch.kv_cache import Rows, RowTable
from server.batch.sequence_model import SequenceShape
from server.device import session as module
from server.device.encoding_runtime import EncodingRuntime
from server.device.runtime import SequenceRuntime
from server.device.session import RuntimeUnavailable, SessionSettings, choose_device
from tests import tiny

ROWS = 7
CONFIGS = {
    "encoder_decoder": tiny.shape("encoder_decoder"),
    "encoder_decoder, grouped heads": tiny.VARIANTS["encoder_decoder: pre, learned, 2, output, gelu"],
    "decoder_only": tiny.shape("decoder_only"),
}


@dataclass
class Row:
    """What one row has been fed: its input, then ``fed``."""

    request: int
    input_ids: list[int]
    fed: list[int]

    def copy(self) -> Row:
        return Row(self.request, self.input_ids, list(self.fed))


class Machine:
    """A runtime beside a plain account of what each row must hold."""

    def __init__(self, name: str, seed: int) -> None:
        self.config, self.rng = CONFIGS[name], random.Random(seed)
        shape = SequenceShape.from_config(self.config.to_dict())
        self.runtime = SequenceRuntime(tiny.graphs(self.config), shape, ROWS, SessionSettings(threads=1))
        self.table, self.rows = RowTable(ROWS), list[Row]()
        self.requests = self.branched = self.moved = 0

    def position(self, row: Row) -> int:
        """Where the next token of ``row`` stands; positions before it are cached."""
        return len(row.fed) if self.config.has_encoder else len(row.input_ids) - 1 + len(row.fed)

    def join(self) -> None:
        inputs, owned = list[list[int]](), list[Rows]()
        while self.table.free and self.rng.random() < 0.7:
            inputs.append(tiny.token_ids(self.rng, self.rng.randint(1, 24)))
            owned.append(self.table.join(self.rng.randint(1, min(3, self.table.free))))
        if not inputs:
            return
        if self.config.has_encoder:
            self.runtime.encode(inputs, owned)
        else:
            for input_ids, rows in zip(inputs, owned, strict=True):
                head, chunk = input_ids[:-1], self.rng.randint(1, 24)
                for begin in range(0, len(head), chunk):
                    self.runtime.prefill(head[begin : begin + chunk], begin)
                self.runtime.adopt(rows, len(head))
        for input_ids, rows in zip(inputs, owned, strict=True):
            self.requests += 1
            self.rows += [Row(self.requests, input_ids, []) for _ in rows]

    def step(self) -> None:
        """Feeds any token to every row and compares what comes next."""
        self.leave({i for i, row in enumerate(self.rows) if self.position(row) == self.config.max_target_length})
        if not self.rows:
            return
        tokens, positions = [], []
        for row in self.rows:
            first = BOS if self.config.has_encoder else row.input_ids[-1]
            tokens.append(self.rng.randrange(3, 40) if row.fed else first)
            positions.append(self.position(row))
            row.fed.append(tokens[-1])
        top_k = self.rng.choice(self.runtime.top_k_choices)
        ids, log_p = self.runtime.decode(np.array(tokens), np.array(positions), top_k)
        wanted = torch.stack([self.reference(row) for row in self.rows])
        np.testing.assert_allclose(self.runtime.logits(np.arange(len(self.rows))), wanted, atol=1e-4)
        best = wanted.log_softmax(-1).sort(dim=-1, descending=True).values[:, :top_k]
        np.testing.assert_allclose(log_p, best, atol=1e-4)
        np.testing.assert_allclose(wanted.log_softmax(-1).gather(-1, torch.from_numpy(ids)), best, atol=1e-4)

    @torch.no_grad()
    def reference(self, row: Row) -> torch.Tensor:
        """Logits after everything that ``row`` was fed."""
        model: Transformer = tiny.model(self.config)
        if self.config.has_encoder:
            return model(torch.tensor([row.input_ids]), torch.tensor([len(row.input_ids)]), torch.tensor([row.fed]))[0, -1]
        return model(torch.tensor([[*row.input_ids[:-1], *row.fed]]))[0, -1]

    def branch(self) -> None:
        """Some rows become copies of another row of their request; no target is a source."""
        sources, targets = list[int](), list[int]()
        for target, row in enumerate(self.rows):
            others = [i for i, o in enumerate(self.rows) if o.request == row.request and i != target and i not in targets]
            if others and target not in sources and self.rng.random() < 0.4:
                sources.append(self.rng.choice(others))
                targets.append(target)
        if sources:
            pairs = [(self.rows[s], self.rows[t]) for s, t in zip(sources, targets, strict=True)]
            start = [self.position(row) - len(row.fed) + _shared(row.fed, other.fed) for row, other in pairs]
            stop = [self.position(row) for row, _ in pairs]
            self.runtime.branch(np.array(sources), np.array(targets), np.array(start), np.array(stop))
            self.branched += len(sources)
            for source, target in zip(sources, targets, strict=True):
                self.rows[target] = self.rows[source].copy()

    def leave_at_random(self) -> None:
        self.leave({i for i in range(len(self.rows)) if self.rng.random() < 0.25})

    def leave(self, gone: set[int]) -> None:
        moves = self.table.leave(np.array(sorted(gone), np.intp))
        if len(moves.source):
            length = max(self.position(self.rows[s]) for s in moves.source.tolist())
            self.runtime.move(*moves, length)
            self.moved += len(moves.source)
            for source, target in zip(moves.source.tolist(), moves.target.tolist(), strict=True):
                self.rows[target] = self.rows[source]
        del self.rows[self.table.live :]


def _shared(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_hold_what_they_were_fed(name: str) -> None:
    machine = Machine(name, seed=1)
    for _ in range(40):
        machine.rng.choice([machine.join, machine.branch, machine.leave_at_random])()
        machine.step()
        machine.step()
    assert min(machine.requests, machine.branched, machine.moved) >= 5


def sequence_runtime(graphs: Path) -> SequenceRuntime:
    shape = SequenceShape.from_config(tiny.shape("decoder_only").to_dict())
    return SequenceRuntime(graphs, shape, 3, SessionSettings(threads=1))


def test_candidates_are_never_more_than_the_vocabulary() -> None:
    runtime = sequence_runtime(tiny.graphs(tiny.shape("decoder_only")))
    assert runtime.top_k_choices[-1] == runtime.shape.vocab_size == 40


def test_a_longest_row_uses_every_position() -> None:
    config = tiny.shape("decoder_only")
    runtime, rng = sequence_runtime(tiny.graphs(config)), random.Random(0)
    prompt = tiny.token_ids(rng, config.max_target_length)
    runtime.prefill(prompt[:-1], 0)
    runtime.adopt(np.array([1]), len(prompt) - 1)
    runtime.decode(np.array([5, prompt[-1]]), np.array([0, len(prompt) - 1]), 1)
    with torch.no_grad():
        wanted = tiny.model(config)(torch.tensor([prompt]))[0, -1]
    np.testing.assert_allclose(runtime.logits(np.array([1]))[0], wanted, atol=1e-4)


@pytest.mark.parametrize("content", [None, b"", b"not a graph"])
def test_a_graph_that_cannot_be_loaded_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    for name in ("decode.onnx", "encode.onnx"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    for build in (sequence_runtime, lambda graphs: EncodingRuntime(graphs, SessionSettings(), classes=2)):
        with pytest.raises(RuntimeUnavailable, match=rf"{tmp_path}/(de|en)code.onnx: ONNX Runtime cannot load it") as caught:
            build(tmp_path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("providers", "asked", "chosen"),
    [
        (["CPUExecutionProvider"], "auto", "cpu"),
        (["CPUExecutionProvider"], "cpu", "cpu"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "auto", "cuda"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda", "cuda"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "cpu", "cpu"),
    ],
)
def test_the_device_is_what_is_asked_for_and_there(
    providers: list[str], asked: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: providers)
    assert choose_device(asked) == chosen


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailable, match="--device cuda: this ONNX Runtime has no CUDA provider"):
        choose_device("cuda")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_may_be_cut_into_runs_of_any_size(name: str) -> None:
    config = CONFIGS[name]
    runtime = SequenceRuntime(
        tiny.graphs(config), SequenceShape.from_config(config.to_dict()), ROWS, SessionSettings(threads=1)
    )
    runtime.tune()
    assert 1 <= runtime.step_rows <= ROWS
    assert (runtime.encoding_overhead > 0.0) == config.has_encoder
    tokens, positions = np.arange(ROWS) % 30 + 4, np.zeros(ROWS, np.int64)
    if config.has_encoder:
        runtime.encode([[5, 6, 7]] * ROWS, [np.array([row]) for row in range(ROWS)])
    found = []
    for size in (ROWS, 1, 3):
        runtime.step_rows = size
        ids, log_p = runtime.decode(tokens, positions, 4)
        found.append((ids.copy(), log_p.copy(), runtime.logits(np.arange(ROWS))))
    for ids, log_p, logits in found[1:]:
        np.testing.assert_array_equal(ids, found[0][0])
        np.testing.assert_allclose(log_p, found[0][1], atol=1e-5)
        np.testing.assert_allclose(logits, found[0][2], atol=1e-5)


def test_the_overhead_of_an_encoding_is_what_does_not_grow_with_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["encoder_decoder"]
    runtime = SequenceRuntime(
        tiny.graphs(config), SequenceShape.from_config(config.to_dict()), ROWS, SessionSettings(threads=1)
    )
    monkeypatch.setattr(runtime, "_time_encoding", lambda count: 0.5 + 2.0 * count)
    runtime.tune()
    assert runtime.encoding_overhead == pytest.approx(0.5)
    monkeypatch.setattr(runtime, "_time_encoding", lambda count: count**2)  # together they take longer: none waits
    runtime.tune()
    assert runtime.encoding_overhead == 0.0
