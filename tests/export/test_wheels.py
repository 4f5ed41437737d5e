"""Files out of pinned wheels: downloaded once, checked, cached, never installed."""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from export import wheels
from realisid_trt.errors import BuildError, DiskError

HELLO = hashlib.sha256(b"hello").hexdigest()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses instead of PyPI, with one wheel in it: demo 1.0, member demo/words.txt."""
    folder = tmp_path / "shop"
    folder.mkdir()
    with zipfile.ZipFile(folder / "demo-1.0-py3-none-any.whl", "w") as wheel:
        files = {
            "demo/words.txt": b"hello",
            "demo-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
            "demo-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        lines = []
        for name, content in files.items():
            wheel.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}")
        wheel.writestr("demo-1.0.dist-info/RECORD", "\n".join([*lines, "demo-1.0.dist-info/RECORD,,"]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_member_is_fetched_once_and_then_cached(shop: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, cache)
    assert path.read_bytes() == b"hello" and path.parent == cache
    (shop / "demo-1.0-py3-none-any.whl").unlink()  # from here on there is no network
    assert wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, cache) == path
    path.write_bytes(b"hullo")  # an altered cache is not used
    with pytest.raises(BuildError, match="cannot be downloaded"):
        wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, cache)


def test_altered_cache_is_mended(shop: Path, tmp_path: Path) -> None:
    path = wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, tmp_path)
    path.write_bytes(b"hullo")
    assert wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, tmp_path).read_bytes() == b"hello"


def test_member_with_another_hash_is_refused(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"SHA-256 {HELLO}, expected {'0' * 64}"):
        wheels.fetch_member("demo==1.0", "demo/words.txt", "0" * 64, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_member_that_is_not_in_the_wheel(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no readable demo/nothing.txt"):
        wheels.fetch_member("demo==1.0", "demo/nothing.txt", HELLO, tmp_path)


def test_no_network_says_where_to_put_the_wheel(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        wheels.fetch_member("demo==2.0", "demo/words.txt", HELLO, tmp_path)
    text = str(caught.value)
    assert "demo==2.0 cannot be downloaded" in text and "PIP_FIND_LINKS" in text and "never installed" in text


def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho '/usr/bin/python: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(BuildError, match="ensurepip"):
        wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, tmp_path / "cache")


def test_cache_is_the_users_and_needs_no_home(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some containers have no home; the cache is then a temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO).parent == tmp_path / "xdg" / "realisid_trt"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO).parent.parent == tmp_path


def test_unwritable_cache_is_a_disk_error(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="could not be written"):
        wheels.fetch_member("demo==1.0", "demo/words.txt", HELLO, tmp_path / "file" / "below")


def test_demo_photos_are_the_pinned_ones(tmp_path: Path) -> None:
    astronaut, hopper = wheels.demo_photos(tmp_path)
    assert hashlib.sha256(astronaut.read_bytes()).hexdigest() == wheels.ASTRONAUT_SHA256
    assert hashlib.sha256(hopper.read_bytes()).hexdigest() == wheels.HOPPER_SHA256
    assert (astronaut.name, hopper.name) == ("astronaut.png", "hopper.jpg")
