"""Reads corpora: parallel text, plain text and labelled text, gzip or not.

A damaged file is refused whole, with one line that names the file and what is wrong with it. Lines end at "\\n" alone: other
characters that Unicode calls line breaks occur inside sentences, and splitting there would shift one side of a parallel corpus.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

_GZIP_MAGIC = b"\x1f\x8b"


class DataError(ValueError):
    """A corpus that cannot be used, in one line: which file, and what is wrong."""


def read_bytes(path: Path) -> bytes:
    """The file's content, unpacked if it is gzip by its first bytes, whatever its name."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip: {error}") from error
    elif path.suffix == ".gz":
        raise DataError(f"{path}: not gzip, though named so")
    if not content.strip():
        raise DataError(f"{path}: empty")
    return content


def read_text(path: Path) -> str:
    content = read_bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x})") from error


def read_lines(path: Path) -> list[str]:
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_parallel(source: Path, target: Path) -> list[tuple[str, str]]:
    """Line i of ``source`` with line i of ``target``."""
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise DataError(f"{source} has {len(sources)} lines but {target} has {len(targets)}")
    return list(zip(sources, targets, strict=True))


def read_labelled(path: Path, labels: Sequence[str]) -> list[tuple[str, int]]:
    """Lines of ``LABEL text`` or ``LABEL<tab>text`` as (text, class).

    Args:
        labels: the name of each class; a file may write the name or the number.
    """
    classes = {str(i): i for i in range(len(labels))} | {label: i for i, label in enumerate(labels)}
    examples = []
    for number, line in enumerate(read_lines(path), 1):
        label, *rest = re.split("[ \t]", line, maxsplit=1)
        text = "".join(rest)
        if label not in classes:
            raise DataError(
                f"{path}: line {number} begins with {label[:40]!r}, not with one of the labels {', '.join(classes)}"
            )
        if not text.strip():
            raise DataError(f"{path}: line {number} has a label but no text")
        examples.append((text, classes[label]))
    return examples


def digest(path: Path) -> str:
    """sha256 of the file as it lies on the disk: what a run records about its data."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
