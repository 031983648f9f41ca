"""A bundle is what its manifest says, to the last byte, or it is refused with one line that says what is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import bundle as module
from export.bundle import BundleError, Manifest, describe_files, digest, open_bundle, session_config, write_bundle
from tests.export.small_bundle import CERTIFICATE, FILES, fill


def change_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((root / "manifest.json").read_text())
    change(values)
    (root / "manifest.json").write_text(json.dumps(values))


def refusal(root: Path) -> str:
    """The one line with which ``root`` is refused."""
    with pytest.raises(BundleError) as caught:
        open_bundle(root)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_a_bundle_opens_as_it_was_written(root: Path) -> None:
    bundle = open_bundle(str(root))
    assert bundle.manifest.name == "tiny"
    assert {name: bundle.path(name).read_bytes() for name in bundle.manifest.files} == FILES
    assert bundle.manifest.files["tokenizer.json"]["bytes"] == 2
    assert bundle.fingerprint == digest(root / "manifest.json")
    with pytest.raises(BundleError, match="no file '../bundle/tokenizer.json'"):
        bundle.path("../bundle/tokenizer.json")


# Files


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(root: Path, name: str) -> None:
    content = bytearray(FILES[name])
    for at in {0, len(content) // 2, len(content) - 1}:
        for bit in (0, 7):
            content[at] ^= 1 << bit
            (root / name).write_bytes(content)
            assert refusal(root) == f"{root}/{name}: damaged (its sha256 is not the manifest's)"
            content[at] ^= 1 << bit
    (root / name).write_bytes(content + b"\n")
    assert f"{root}/{name}: damaged" in refusal(root)
    (root / name).write_bytes(content)
    open_bundle(root)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    assert refusal(root) == f"{root}/{name}: missing, but the manifest names it"


@pytest.mark.parametrize("name", ["extra.txt", "fp32/weights.data", ".hidden", "new/folder/file", "fp32/decode.onnx~"])
def test_an_extra_file_is_named(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()
    assert refusal(root) == f"{root}/{name}: not in the manifest"


def test_no_such_directory(root: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", root / "tokenizer.json"):
        assert refusal(path) == f"{path}: not a bundle (no such directory)"
    assert refusal(tmp_path) == f"{tmp_path}: not a bundle (no manifest.json)"
    (root / "manifest.json").unlink()
    assert refusal(root) == f"{root}: not a bundle (no manifest.json)"


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_link_to_a_file_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (root / name).rename(outside)
    (root / name).symlink_to(outside)
    assert refusal(root) == f"{root}/{name}: must be a regular file with one name (no links)"


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_second_name_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").hardlink_to(root / name)
    assert refusal(root) == f"{root}/{name}: must be a regular file with one name (no links)"


def test_a_link_to_a_directory_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "fp32").rename(tmp_path / "outside")
    (root / "fp32").symlink_to(tmp_path / "outside")
    assert refusal(root) == f"{root}/fp32: must be a regular file with one name (no links)"
    (tmp_path / "link").symlink_to(root)
    assert refusal(tmp_path / "link") == f"{tmp_path}/link: not a bundle (no such directory)"


def test_a_pipe_is_refused_and_not_waited_for(root: Path) -> None:
    (root / "tokenizer.json").unlink()
    os.mkfifo(root / "tokenizer.json")
    assert "must be a regular file" in refusal(root)


def test_what_cannot_be_read_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "digest", unreadable)
    assert re.fullmatch(rf"{root}/.+: Permission denied", refusal(root))


# Names in the manifest


@pytest.mark.parametrize("name", ["../secret", "fp32/../../secret", "..", ".", "", "/etc/passwd", "fp32/../tokenizer.json"])
def test_a_name_cannot_leave_the_bundle(root: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    facts = {"sha256": digest(secret), "bytes": 6}
    monkeypatch.setattr(module, "digest", lambda path: pytest.fail(f"{path} was read"))
    change_manifest(root, lambda values: values["files"].update({name: facts}))
    assert refusal(root).endswith(": missing, but the manifest names it")


@given(
    st.lists(st.sampled_from(["..", ".", "", "fp32", "decode.onnx", "secret", "a\0b", "a\nb", "\ud800", "\x1b[2J"]), min_size=1)
)
def test_no_name_opens_anything_outside(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    name = "/".join(parts)
    base = tmp_path_factory.mktemp("names")
    (base / "secret").write_text("secret")
    write_bundle(base / "bundle", fill)
    change_manifest(base / "bundle", lambda values: values["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    refusal(base / "bundle")


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "tab\there"])
def test_a_strange_name_on_disk_makes_no_second_line(root: Path, name: str) -> None:
    (root / name).touch()
    assert refusal(root).endswith(": not in the manifest")


# The manifest

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "not JSON": (b"{", "not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "not UTF-8": (b'{"name": "\xff"}', "not UTF-8"),
    "too deep": (b"[" * 200_000, "not JSON"),
    "a number too long": (b'{"format_version": ' + b"1" * 10_000 + b"}", "not JSON"),
    "a later format": (b'{"format_version": 999}', "format version 999"),
    "no format": (b"{}", "format version None"),
    "a format that is true": (b'{"format_version": true}', "format version True"),
    "too big": (b" " * (module.MAX_MANIFEST_BYTES + 1), "larger than"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_manifest_is_refused(root: Path, damage: str) -> None:
    content, complaint = DAMAGED[damage]
    (root / "manifest.json").write_bytes(content)
    message = refusal(root)
    assert message.startswith(f"{root}/manifest.json: ")
    assert complaint in message


KEYS = sorted(Manifest.__dataclass_fields__)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_must_be_there_with_its_type(root: Path, key: str) -> None:
    whole = (root / "manifest.json").read_text()
    change_manifest(root, lambda values: values.pop(key))
    assert "manifest.json: " in refusal(root)
    for wrong in (None, 1.5, [1], {"a": 1}, "text", 7, True):
        (root / "manifest.json").write_text(whole)
        if type(wrong) is type(json.loads(whole)[key]):
            continue
        change_manifest(root, lambda values, wrong=wrong: values.update({key: wrong}))
        message = refusal(root)
        assert message.startswith(f"{root}/manifest.json: ")
        assert key in message or (key == "format_version" and "format version" in message)


def test_an_unknown_key_is_named(root: Path) -> None:
    change_manifest(root, lambda values: values.update({"limit": {}, "a\nb": 1}))
    assert refusal(root) == f"{root}/manifest.json: unknown key a\\nb, limit"


@pytest.mark.parametrize("facts", [None, [], "", {}, {"sha256": None}, {"sha256": ["x"]}, {"bytes": 2}])
def test_a_file_without_its_hash_is_refused(root: Path, facts: Any) -> None:
    change_manifest(root, lambda values: values["files"].update({"tokenizer.json": facts}))
    assert "tokenizer.json: damaged" in refusal(root)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(
    values=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), json_values, max_size=4),
    dropped=st.sets(st.sampled_from(KEYS)),
)
def test_no_manifest_brings_the_reader_down(tmp_path_factory: pytest.TempPathFactory, values: dict, dropped: set[str]) -> None:
    root = tmp_path_factory.mktemp("any") / "bundle"
    write_bundle(root, fill)
    original = json.loads((root / "manifest.json").read_text())
    change_manifest(root, lambda whole: (whole.update(values), [whole.pop(key) for key in dropped if key in whole]))
    try:
        bundle = open_bundle(root)
    except BundleError as error:
        assert str(error).isprintable()
    else:
        for key in ("files", "certificate", "format_version"):
            assert getattr(bundle.manifest, key) == original[key]


@given(content=st.binary(max_size=64))
def test_no_bytes_bring_the_reader_down(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.mktemp("bytes")
    (root / "manifest.json").write_bytes(content)
    refusal(root)


# The certificate


@pytest.mark.parametrize(
    "change",
    [
        {"passed": False},
        {"passed": None},
        {"passed": "true"},
        {"passed": 1},
        {"stages": []},
        {"stages": [{"max_logit_difference": 2e-4, "identical_tokens": 1.0}]},
        {"stages": [*CERTIFICATE["stages"], {"max_logit_difference": 0.0, "identical_tokens": 0.9}]},
        {"stages": [{"max_logit_difference": float("nan"), "identical_tokens": 1.0}]},
        {"stages": [{"identical_tokens": 1.0}]},
        {"stages": "none"},
        {"stages": None},
        {"thresholds": {}},
        {"thresholds": 3},
        {"metric": {"loss": 0.2}},
        {"metric": {"name": "bleu"}},
        {"metric": [1]},
        {"shortlist": {"loss": 0.2}},
        {"shortlist": {"loss": float("nan")}},
        {"shortlist": {"tokens": 3}},
        {"alignment": {"max_weight_difference": 0.2}},
        {"alignment": {"max_weight_difference": float("nan")}},
        {"alignment": {"positions": 3}},
    ],
    ids=str,
)
def test_a_certificate_that_does_not_hold_is_refused(root: Path, change: dict[str, Any]) -> None:
    change_manifest(root, lambda values: values["certificate"]["fp32"].update(change))
    assert refusal(root) == f"{root}/manifest.json: the parity certificate is missing or failed"


@pytest.mark.parametrize(
    "change",
    [
        {"certificate": {}},
        {"certificate": {"fp32": None}},
        {"certificate": {"fp16": CERTIFICATE}},
        {"precisions": []},
        {"precisions": ["fp32", "fp16"]},
        {"precisions": ["fp16"]},
    ],
    ids=str,
)
def test_every_precision_needs_its_certificate(root: Path, change: dict[str, Any]) -> None:
    change_manifest(root, lambda values: values.update(change))
    assert refusal(root) == f"{root}/manifest.json: the parity certificate is missing or failed"


def test_a_failed_certificate_of_one_precision_is_refused(root: Path) -> None:
    both = {"fp32": CERTIFICATE, "fp16": CERTIFICATE | {"passed": False}}
    change_manifest(root, lambda values: values.update(certificate=both, precisions=["fp32", "fp16"]))
    assert refusal(root) == f"{root}/manifest.json: the parity certificate is missing or failed"


def test_a_certificate_of_other_graphs_is_refused(root: Path) -> None:
    (root / "fp32/decode.onnx").write_bytes(b"another")
    change_manifest(root, lambda values: values.update(files=describe_files(root)))  # whoever swaps a graph can hash it too
    assert refusal(root) == f"{root}/manifest.json: the parity certificate of fp32 is of other graphs"
    change_manifest(root, lambda values: values["certificate"]["fp32"].pop("graphs"))
    assert refusal(root) == f"{root}/manifest.json: the parity certificate of fp32 is of other graphs"


PRECISE = {"session.x64quantprecision": "1"}


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", {}),
        ("flags\t\t: fpu avx2 avx_vnni\nflags\t\t: fpu avx2 avx_vnni\n", {}),
        ("flags\t\t: fpu avx2 avx512f\nbugs\t\t: avx512_vnni\n", PRECISE),
        ("flags\t\t: avx512_vnni\nflags\t\t: avx2\n", PRECISE),  # a run may begin on either
        ("flags\t\t: avx512_vnnix\n", PRECISE),
        ("Features\t: fp asimd asimddp\n", PRECISE),
        ("", PRECISE),
        (None, PRECISE),
    ],
)
def test_weights_become_unsigned_where_sums_saturate(told: str | None, wanted: dict[str, str], tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if told is not None:
        cpuinfo.write_text(told, encoding="utf-8")
    assert session_config(cpuinfo) == wanted
