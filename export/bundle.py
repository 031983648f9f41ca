"""The bundle: the only thing that crosses from PyTorch to serving.

A directory that describes itself and is closed: ``manifest.json`` names every other file with its sha256, and a file that it
does not name, or a link in any place, makes the whole refused. Standard library only, because the server reads bundles too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
SHORTLIST = "shortlist.json"
KNOWN_ANSWERS = "known_answers.json"
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
CACHE_TYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""What keys and values are kept in, by precision; names as in numpy and torch."""
_VNNI = {"avx512_vnni", "avx_vnni"}


class BundleError(Exception):
    """A bundle that must not be used: one line saying what and where."""

    def __init__(self, message: str) -> None:
        # Names in a stranger's bundle may hold anything, line breaks and terminal codes too.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def session_config(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Settings of every ONNX Runtime session over these graphs, on this processor.

    On x86 without VNNI products of eight bits are added two at a time in 16 bits, which saturate: outputs are wrong by much.
    With this setting weights become unsigned, and the sums are exact; with VNNI they are exact without it, and a product takes
    half as long. A processor that cannot be asked is taken to have no VNNI. (Others than x86 are not touched by the setting.)
    """
    features = processor_features(cpuinfo)
    exact = bool(features) and all(_VNNI & one for one in features)
    return {} if exact else {"session.x64quantprecision": "1"}


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[set[str]]:
    """What each processor can do, by Linux's names ("avx512_vnni", "amx_int8"); empty where nobody says, or it is not x86."""
    try:
        told = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [set(line.split()) for line in told.splitlines() if line.startswith("flags")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a server needs to know of a model, beside its weights."""

    format_version: int
    name: str
    parameters: int
    model: dict[str, Any]
    """``model.config.ModelConfig.to_dict()``."""
    task: dict[str, Any]
    """name, kind ("sequence_to_sequence", "language_model", "classification"), labels, metric."""
    generation: dict[str, Any]
    """Defaults for options a caller leaves out: beams, length_penalty, max_tokens."""
    limits: dict[str, int]
    """max_input_tokens and max_output_tokens, special tokens included."""
    precisions: list[str]
    """Sets of graphs in the bundle; each lies in a folder of its name."""
    provenance: dict[str, Any]
    """How the weights came to be: seed, steps, data digests, metrics."""
    certificate: dict[str, Any]
    """The parity certificate of each precision: how far each stage from training to serving is from the one before."""
    files: dict[str, dict[str, Any]]
    """Relative path -> {"sha256": ..., "bytes": ...}, for every file but the manifest."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Raises BundleError for anything but an object with exactly these keys and their types."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise BundleError(f"{where}: not a JSON object")
        found = values.get("format_version")
        if type(found) is not int or found != FORMAT_VERSION:
            raise BundleError(f"{where}: format version {found!r}, this release reads {FORMAT_VERSION}")
        names = {field.name for field in fields(cls)}
        if missing := sorted(names - set(values)):
            raise BundleError(f"{where}: missing {', '.join(missing)}")
        if strangers := sorted(set(values) - names):
            raise BundleError(f"{where}: unknown key {', '.join(strangers)}")
        kinds = {"format_version": int, "name": str, "parameters": int, "precisions": list}
        for name in sorted(names):
            kind = kinds.get(name, dict)
            if type(values[name]) is not kind:
                raise BundleError(f"{where}: {name} must be a {kind.__name__}")
        if not all(isinstance(precision, str) for precision in values["precisions"]):
            raise BundleError(f"{where}: precisions must be names")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownAnswer:
    """What the graphs of one precision gave for an input where they were certified."""

    input: list[int]
    """Token ids."""
    output: list[int]
    """Token ids that continue it; none of an encoder-only model."""
    values: list[float]
    """Their log-probabilities; of an encoder-only model the class probabilities, then the vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownAnswers:
    """With which a server finds out whether its machine computes what the certificate speaks of."""

    most_difference: float
    """Of a value from its own, on average, that another machine may have."""
    answers: list[KnownAnswer]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: every file present, regular, and with the hash its manifest states."""

    root: Path
    manifest: Manifest
    fingerprint: str
    """sha256 of the manifest, so of everything."""

    def path(self, name: str) -> Path:
        """Raises BundleError for a name that the manifest does not hold."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.root}: no file {name!r} in the manifest")
        return self.root / name

    def shortlist(self) -> list[int] | None:
        """The ids of the only tokens that outputs may contain, rising; None where there is no such list.

        Raises:
            BundleError: for a list that this is not.
        """
        if SHORTLIST not in self.manifest.files:
            return None
        path = self.root / SHORTLIST
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path}: not JSON ({error})") from None
        sound = isinstance(ids, list) and len(ids) > 0 and all(type(i) is int for i in ids)
        if not sound or ids[0] < 0 or ids[-1] >= self.manifest.model["vocab_size"] or sorted(set(ids)) != ids:
            raise BundleError(f"{path}: must be rising ids of the model's vocabulary")
        return cast("list[int]", ids)

    def known_answers(self, precision: str) -> KnownAnswers:
        """Raises BundleError for a file that holds something else."""
        path = self.path(f"{precision}/{KNOWN_ANSWERS}")
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            answers = [KnownAnswer(**answer) for answer in told["answers"]]
            found = KnownAnswers(most_difference=float(told["most_difference"]), answers=answers)
            sound = len(answers) > 0 and all(_is_answer(answer, self.manifest.model) for answer in answers)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BundleError(f"{path}: not known answers ({type(error).__name__}: {error})") from None
        if not sound or not 0 <= found.most_difference < math.inf:
            raise BundleError(f"{path}: not known answers of such a model")
        return found


def _is_answer(answer: KnownAnswer, model: dict[str, Any]) -> bool:
    ids = [*answer.input, *answer.output]
    numbers = all(type(value) is float and math.isfinite(value) for value in answer.values)
    known = all(type(i) is int and 0 <= i < model["vocab_size"] for i in ids)
    lengths = len(answer.values) == len(answer.output) if model["family"] != "encoder_only" else not answer.output
    return numbers and known and lengths and len(answer.input) > 0 and len(answer.values) > 0


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bundle(root: Path | str) -> Bundle:
    """Checks a bundle before anything in it is parsed: the exact set of files, no links, every hash, the certificate's verdict.

    Raises:
        BundleError: one line saying what is wrong and where.
    """
    try:
        return _open(Path(root))
    except OSError as error:
        raise BundleError(f"{error.filename or root}: {error.strerror}") from None


def _open(root: Path) -> Bundle:
    if root.is_symlink() or not root.is_dir():
        raise BundleError(f"{root}: not a bundle (no such directory)")
    found = _regular_files(root)
    if MANIFEST not in found:
        raise BundleError(f"{root}: not a bundle (no {MANIFEST})")
    path = root / MANIFEST
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    raw = path.read_bytes()
    try:
        manifest = Manifest.from_json(raw.decode("utf-8"), path)
    except UnicodeDecodeError:
        raise BundleError(f"{path}: not UTF-8") from None
    named = set(manifest.files)
    if missing := sorted(named - found):
        raise BundleError(f"{root / missing[0]}: missing, but the manifest names it")
    if strangers := sorted(found - named - {MANIFEST}):
        raise BundleError(f"{root / strangers[0]}: not in the manifest")
    for name, facts in manifest.files.items():
        if not isinstance(facts, dict) or digest(root / name) != facts.get("sha256"):
            raise BundleError(f"{root / name}: damaged (its sha256 is not the manifest's)")
    certificates = manifest.certificate
    if not certificates or set(certificates) != set(manifest.precisions) or not all(map(_certified, certificates.values())):
        raise BundleError(f"{path}: the parity certificate is missing or failed")
    for precision, certificate in certificates.items():
        if certificate.get("graphs") != graph_hashes(manifest.files, precision):
            raise BundleError(f"{path}: the parity certificate of {precision} is of other graphs")
    return Bundle(root, manifest, hashlib.sha256(raw).hexdigest())


def _certified(certificate: dict[str, Any]) -> bool:
    """Whether it says so, and its own numbers say so too; written so that a NaN fails."""
    try:
        limits, stages, metric = certificate["thresholds"], certificate["stages"], certificate["metric"]
        shortlist, alignment = certificate["shortlist"], certificate["alignment"]
        return (
            certificate["passed"] is True
            and len(stages) > 0
            and all(stage["max_logit_difference"] <= limits["max_logit_difference"] for stage in stages)
            and all(stage["identical_tokens"] >= limits["identical_tokens"] for stage in stages)
            and (not metric or metric["loss"] <= limits["metric_loss"])
            and (not shortlist or shortlist["loss"] <= limits["shortlist_loss"])
            and (not alignment or alignment["max_weight_difference"] <= limits["max_weight_difference"])
        )
    except (KeyError, TypeError):
        return False


def _regular_files(root: Path) -> set[str]:
    """Relative paths of all files below ``root``; links and special files are refused."""
    names = set()
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        for entry in [*subfolders, *files]:
            path = Path(folder) / entry
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise BundleError(f"{path}: must be a regular file with one name (no links)")
            names.add(path.relative_to(root).as_posix())
    return names


def _raise(error: OSError) -> None:
    raise error


def describe_files(root: Path) -> dict[str, dict[str, Any]]:
    """What the manifest's ``files`` must hold for the files that lie below ``root``."""
    return {
        name: {"sha256": digest(root / name), "bytes": (root / name).stat().st_size}
        for name in sorted(_regular_files(root) - {MANIFEST})
    }


def graph_hashes(files: dict[str, dict[str, Any]], precision: str) -> dict[str, str]:
    """sha256 of each graph of one precision, and of its known answers: what its certificate speaks of."""
    return {name: facts["sha256"] for name, facts in files.items() if name.startswith(f"{precision}/")}


def write_shortlist(folder: Path, ids: Sequence[int]) -> None:
    (folder / SHORTLIST).write_text(json.dumps(list(ids)) + "\n", encoding="utf-8")


def write_known_answers(graphs: Path, known: KnownAnswers) -> None:
    """Args: graphs: the folder of one precision's graphs."""
    (graphs / KNOWN_ANSWERS).write_text(json.dumps(asdict(known), allow_nan=False) + "\n", encoding="utf-8")


def write_bundle(target: Path, fill: Callable[[Path], Manifest], *, force: bool = False) -> None:
    """Builds a bundle beside its place and moves it there in one step, so that a crash leaves no half bundle.

    Args:
        fill: writes every file but the manifest into the folder it is given, and returns the manifest.
        force: replace a bundle that is there already.

    Raises:
        BundleError: when ``target`` exists and ``force`` is not set, or is something other than a bundle.
    """
    if os.path.lexists(target):
        if not force:
            raise BundleError(f"{target}: exists already (--force replaces it)")
        if target.is_symlink() or not (target / MANIFEST).is_file():
            raise BundleError(f"{target}: exists and is not a bundle; not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    work.mkdir()
    try:
        manifest = fill(work)
        with (work / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            old = work.with_suffix(".old")
            target.rename(old)
            work.rename(target)
            shutil.rmtree(old)
        else:
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
