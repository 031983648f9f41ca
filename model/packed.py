"""Examples in ids, one after another in two arrays: small in memory, and on the disk prepared once and then only mapped.

On the disk a list of examples is NAME.ids.npy and NAME.ends.npy, where NAME is a checksum of everything it was made from. All
processes of a machine share the pages that they read, which need not fit into its memory.

Shapes: N examples, L ids of all of them together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from model.batches import Example
from model.files import write_atomically, write_text


@dataclass(frozen=True, slots=True, eq=False)
class PackedExamples(Sequence[Example]):
    ids: NDArray[np.int32]
    """[L]: the first example's input, its output, the second's input, …"""
    ends: NDArray[np.int64]
    """[N, 2]: where in ``ids`` each example's input and output end."""
    rows: NDArray[np.int64] | None = None
    """The examples that count, by index; None: all."""

    def __len__(self) -> int:
        return len(self.ends if self.rows is None else self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index] if self.rows is None else int(self.rows[index])
        middle, end = self.ends[row].tolist()
        begin = int(self.ends[row - 1, 1]) if row else 0
        return Example(self.ids[begin:middle].tolist(), self.ids[middle:end].tolist())

    def lengths(self) -> NDArray[np.int64]:
        """[N, 2]: ids of each input and output."""
        lengths = np.diff(self.ends.reshape(-1), prepend=0).reshape(-1, 2)
        return lengths if self.rows is None else lengths[self.rows]

    def only(self, keep: NDArray[np.bool_]) -> PackedExamples:
        """Those for which ``keep`` [N] holds."""
        rows = np.arange(len(self.ends)) if self.rows is None else self.rows
        return PackedExamples(self.ids, self.ends, rows[keep])

    def gathered(self) -> PackedExamples:
        """The same, in memory without what was left out, if anything was."""
        if self.rows is None:
            return self
        lengths = np.diff(self.ends[:, 1], prepend=0)  # ids of each example
        kept = np.zeros(len(lengths), np.bool_)
        kept[self.rows] = True
        return PackedExamples(self.ids[np.repeat(kept, lengths)], self.lengths().cumsum().reshape(-1, 2))


def pack(examples: Iterable[Example]) -> PackedExamples:
    ids, ends, end = [np.empty(0, np.int32)], [], 0
    for example in examples:
        middle = end + len(example.input)
        end = middle + len(example.output)
        ids += [np.array(example.input, np.int32), np.array(example.output, np.int32)]
        ends.append((middle, end))
    return PackedExamples(np.concatenate(ids), np.array(ends, np.int64).reshape(-1, 2))


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """Where packed examples are kept."""

    folder: Path

    def examples(self, origin: dict[str, Any], make: Callable[[], Iterable[Example]]) -> PackedExamples:
        """The examples made from ``origin``: mapped if they are there and whole, else made and written first.

        Args:
            origin: everything that decides what ``make`` gives; for files their checksums.

        Raises:
            OSError: they cannot be written.
        """
        ids, ends = (self._path(origin, f"{array}.npy") for array in ("ids", "ends"))
        mapped = _map(ids, ends)
        if mapped is None:
            packed = pack(make())
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(packed.ids, ids)
            _write(packed.ends, ends)  # last: it says that both are there
            mapped = _map(ids, ends)
        if mapped is None:
            raise OSError(0, "cannot be read back", str(ends))
        return mapped

    def text(self, origin: dict[str, Any], make: Callable[[], str]) -> str:
        """The same for a text, of a tokenizer for instance."""
        path = self._path(origin, "json")
        if not path.exists():
            text = make()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        return path.read_text(encoding="utf-8")

    def _path(self, origin: dict[str, Any], kind: str) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]}.{kind}"


def _map(ids: Path, ends: Path) -> PackedExamples | None:
    """None if one is missing, cut off or of another run of this module."""
    try:
        mapped = PackedExamples(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in (ids, ends)))
    except (OSError, ValueError, EOFError):
        return None
    whole = mapped.ends.ndim == 2 and len(mapped.ends) and mapped.ends[-1, -1] == len(mapped.ids)
    return mapped if whole else None


def _write(array: NDArray[Any], path: Path) -> None:
    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:  # np.save would add a suffix to the name
            np.save(file, array, allow_pickle=False)

    write_atomically(path, save)
