from __future__ import annotations

from pathlib import Path

import pytest

from tests.load.inputs import InputError, dates, read_lines


def test_dates_are_many_and_repeatable() -> None:
    texts = dates(500, seed=1)
    assert texts == dates(500, seed=1)
    assert len(set(texts)) > 450
    assert all(any(character.isdigit() for character in text) for text in texts)


def test_a_file_gives_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "inputs.txt"
    path.write_text("ein Hund\n\n  eine Katze  \n", encoding="utf-8")
    assert read_lines(path) == ["ein Hund", "eine Katze"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_text_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.txt"):
        read_lines(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: No such file"):
        read_lines(tmp_path / "none.txt")
