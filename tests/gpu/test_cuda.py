"""The engine on a CUDA device. Skipped, with the reason, where there is none."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest

from export.graphs import graph_modules
from export.trace import trace
from model.config import ModelConfig
from server.batch.engine import Engine
from server.batch.sequence_model import SequenceShape
from server.device.runtime import SequenceRuntime
from server.device.session import RuntimeUnavailable, SessionSettings, choose_device
from tests import tiny
from tests.server.batch.requests import FAMILIES, expected, random_request, run

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def half_graphs(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, folder = tiny.shape(family), tmp_path_factory.mktemp(f"fp16-{family}")
    for name, module in graph_modules(copy.deepcopy(tiny.model(config)).half()).items():
        trace(module, config, folder / f"{name}.onnx", "fp16")
    return folder


def cuda_engine(config: ModelConfig, graphs: Path, rows: int = 16) -> Engine:
    try:
        choose_device("cuda")
        shape = SequenceShape.from_config(config.to_dict())
        runtime = SequenceRuntime(graphs, shape, rows, SessionSettings(device="cuda"))
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    return Engine(runtime, start_token=1, end_token=2, join_tokens=24)


def test_half_precision_on_the_device_follows_the_reference_decoder(family: str, half_graphs: Path) -> None:
    rng = random.Random(1)
    requests = [random_request(rng, f"r{i}") for i in range(60)]
    events = run(cuda_engine(tiny.shape(family), half_graphs), requests, rng)
    same = 0
    for request in requests:
        found, wanted = events[request.id][-1].hypotheses, expected(family, request)
        if [list(h.tokens) for h in found] == [h.tokens for h in wanted]:
            same += 1
            for ours, theirs in zip(found, wanted, strict=True):
                np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=0.05)
    assert same >= 0.9 * len(requests), f"{same} of {len(requests)}"


def test_a_result_on_the_device_does_not_depend_on_neighbours(family: str, half_graphs: Path) -> None:
    rng = random.Random(2)
    requests = [random_request(rng, f"r{i}") for i in range(40)]
    engine = cuda_engine(tiny.shape(family), half_graphs)
    together = run(engine, requests, rng)
    same = 0
    for request in requests:
        alone = run(engine, [request], rng)[request.id][-1]
        same += [h.tokens for h in alone.hypotheses] == [h.tokens for h in together[request.id][-1].hypotheses]
    assert same >= 0.95 * len(requests), f"{same} of {len(requests)}"
