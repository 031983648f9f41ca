"""A bundle appears whole, in one step, or not at all; and nothing that is no bundle is ever replaced by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.bundle import BundleError, Manifest, open_bundle, write_bundle
from tests.export.small_bundle import fill


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_replaced_without_force(root: Path) -> None:
    before = content_of(root)
    with pytest.raises(BundleError, match=r"bundle: exists already \(--force replaces it\)"):
        write_bundle(root, fill)
    assert content_of(root) == before
    (root / "tokenizer.json").write_text("spoiled")
    write_bundle(root, fill, force=True)
    assert content_of(root) == before
    assert list(root.parent.iterdir()) == [root]


def test_force_replaces_bundles_alone(tmp_path: Path, root: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(root)
    for target in (precious, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(BundleError, match="exists and is not a bundle; not replaced"):
            write_bundle(target, fill, force=True)
    assert (precious / "thesis.txt").exists()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [RuntimeError("full disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_crash_leaves_nothing_behind(root: Path, error: BaseException) -> None:
    def crash(folder: Path) -> Manifest:
        fill(folder)
        raise error

    before = content_of(root.parent)
    for target, force in ((root.parent / "new", False), (root, True)):
        with pytest.raises(type(error)):
            write_bundle(target, crash, force=force)
        assert content_of(root.parent) == before
    assert list(root.parent.iterdir()) == [root]


def test_a_half_written_bundle_is_never_seen(root: Path) -> None:
    def look(folder: Path) -> Manifest:
        assert folder.parent == root.parent  # one file system, so that it moves in one step
        assert open_bundle(root)
        with pytest.raises(BundleError):
            open_bundle(folder)
        return fill(folder)

    write_bundle(root, look, force=True)
    assert open_bundle(root)
