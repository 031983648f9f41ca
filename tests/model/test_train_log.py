from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from model.train_log import TrainLog, read_log

QUIET = Console(quiet=True)


def entry(update: int) -> dict[str, float]:
    return {"update": update, "epoch": 0, "loss": 1.0 / update, "seconds": 1.0 * update}


def write_log(path: Path, updates: range, resume_at: int | None = None) -> None:
    with closing(TrainLog(path, 10, resume_at, QUIET)) as log:
        for update in updates:
            log.update(entry(update), 100.0, 60.0)


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, range(1, 8))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"update": 8, "lo')  # the power went
    write_log(path, range(6, 11), resume_at=5)
    assert [line["update"] for line in read_log(path)] == list(range(1, 11))


def test_a_new_log_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, range(1, 8))
    write_log(path, range(1, 3))
    assert read_log(path) == [entry(1), entry(2)]


def test_a_full_disk_is_reported_once(tmp_path: Path) -> None:
    log = TrainLog(tmp_path / "log.jsonl", 10, None, QUIET)
    log._file.close()
    log._file = Path("/dev/full").open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device"):
        log.update(entry(1), 100.0, 60.0)
    log.close()
