import pytest
import torch

from model.device import PRECISIONS, describe_machine, keep_freed_memory, pick_device, pick_precision


def test_a_missing_gpu_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        pick_device("cuda")


def test_auto_precision_is_one_of_the_known() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) in PRECISIONS
    assert pick_precision("fp32", cpu) == "fp32"
    assert pick_precision("bf16", cpu) == "bf16"


def test_the_machine_has_a_name_and_memory_still_works() -> None:
    keep_freed_memory()
    assert torch.ones(1 << 20).sum() == 1 << 20
    assert "CPU cores" in describe_machine(torch.device("cpu"))
