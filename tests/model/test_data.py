import gzip
from pathlib import Path

import pytest

from model.data import DataError, digest, read_labelled, read_lines, read_parallel, read_text


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    assert read_lines(write(tmp_path / "plain.txt", b"a\nb\n")) == ["a", "b"]
    assert read_lines(write(tmp_path / "zipped.txt", gzip.compress(b"a\nb\n"))) == ["a", "b"]


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    text = "one\u2028still one\x85still\x0bone\x1cone\ntwo"
    assert read_lines(write(tmp_path / "a", text.encode())) == text.split("\n")
    assert read_lines(write(tmp_path / "b", b"dos\r\nline\r\n")) == ["dos", "line"]
    assert read_lines(write(tmp_path / "c", b"a\n\nb\n")) == ["a", "", "b"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.gz", b"plain text", "not gzip"),
        ("a.gz", gzip.compress(b"text" * 1000)[:-20], "damaged gzip"),
        ("a.gz", gzip.compress(b"text")[:-4] + b"\0\0\0\0", "damaged gzip"),
        ("a.gz", b"\x1f\x8b rubbish", "damaged gzip"),
        ("a.gz", gzip.compress(b""), "empty"),
        ("a.txt", b"", "empty"),
        ("a.txt", b"\n\n", "empty"),
        ("a.txt", b"good\nbad \xff\n", "line 2 is not UTF-8"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_with_its_name(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=problem) as refusal:
        read_text(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: No such file"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(DataError, match="Is a directory"):
        read_text(tmp_path)


def test_unequal_sides_are_refused_with_both_counts(tmp_path: Path) -> None:
    source, target = write(tmp_path / "en", b"a\nb\nc\n"), write(tmp_path / "de", b"a\nb\n")
    with pytest.raises(DataError, match=r"en has 3 lines but .*de has 2"):
        read_parallel(source, target)
    assert read_parallel(target, target) == [("a", "a"), ("b", "b")]


def test_labels_stand_before_a_space_or_a_tab(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"1 a good one\n0\ta bad one\npositive a\ttab in it\n")
    assert read_labelled(path, ["negative", "positive"]) == [("a good one", 1), ("a bad one", 0), ("a\ttab in it", 1)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"1 fine\nno label\n", "line 2 begins with 'no'"), (b"0\n", "line 1 has a label but no text"), (b"2 x\n", "'2'")],
)
def test_a_missing_label_or_text_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem):
        read_labelled(write(tmp_path / "a", content), ["negative", "positive"])


def test_digest_is_of_the_file_as_it_lies_there(tmp_path: Path) -> None:
    assert digest(write(tmp_path / "a", b"")) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
