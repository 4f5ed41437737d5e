"""Folders that appear whole or not at all: on overlayfs, beside other containers, on network file systems."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from export import files
from export.building.staging import open_staging
from export.files import exchange, target_folder, whole_folder
from realisid_trt.errors import DiskError, RealisIDWarning
from realisid_trt.files import whole_or_not
from realisid_trt.manifest import MANIFEST
from tests.conftest import ROOT


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A container's file system: a folder `engine` in a layer of its image, and a layer above it that is written to."""
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for folder in (lower / "engine", upper, work, merged):
        folder.mkdir(parents=True)
    (lower / "engine" / "file").write_text("old")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounted = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no overlay file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield merged
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def test_a_layer_of_an_image_is_told_before_the_hour(overlay: Path) -> None:
    """It is refused before the long work, and the command in the message helps."""
    engine = overlay / "engine"
    with pytest.raises(DiskError, match="a layer of the container's image .* copy it out of the layer") as caught:
        target_folder(engine)
    assert (engine / "file").read_text() == "old" and [path.name for path in overlay.iterdir()] == ["engine"]
    command = str(caught.value).rpartition("same command again: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert target_folder(engine) == engine and (engine / "file").read_text() == "old"
    with whole_folder(engine) as partial:
        (partial / "file").write_text("new")
    assert (engine / "file").read_text() == "new" and [path.name for path in overlay.iterdir()] == ["engine"]
    assert target_folder(overlay / "another") == overlay / "another"


def test_an_exchange_that_the_system_refuses_is_typed(overlay: Path) -> None:
    (overlay / "new").mkdir()
    with pytest.raises(DiskError, match="cannot be written .*cross-device.* Choose another --out"):
        exchange(overlay / "new", overlay / "engine")
    assert (overlay / "engine" / "file").read_text() == "old"


def test_what_cannot_be_removed_is_left_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system keeps files that a server has open (.nfs…). The new engine is published all the same."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(
        RealisIDWarning, match="old is published, but the previous folder could not be removed completely .*Remove"
    ):
        exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "new"


MAKER = """import sys, time
from pathlib import Path
from export.files import whole_folder
with whole_folder(Path(sys.argv[1])) as partial:
    print(partial.name, flush=True)
    time.sleep(60)"""


def test_what_another_container_makes_is_not_swept(tmp_path: Path) -> None:
    """Its process number means another process here, or none. A lock shows that it runs."""
    out, words = tmp_path / "made [1]", [sys.executable, "-c", MAKER]
    with subprocess.Popen([*words, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        elsewhere = tmp_path / f".{out.name}.1-0a0b0c0d.part"  # a process number that every container has
        (tmp_path / name).rename(elsewhere)
        with whole_folder(out) as partial:
            (partial / "file").touch()
        assert elsewhere.is_dir() and (out / "file").is_file()
        process.kill()
    with whole_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_without_locks_only_what_is_old_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for name, age in (("new", 60.0), ("old", files.WEEK_SECONDS + 60.0)):
        (tmp_path / f".made.{name}.part").mkdir()
        os.utime(tmp_path / f".made.{name}.part", (time.time() - age,) * 2)
    with whole_folder(tmp_path / "made"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"made", ".made.new.part"}


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), whole_folder(tmp_path / "made") as partial:
        (partial / "file").touch()
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_the_umask_s(tmp_path: Path, umask: int) -> None:
    """This holds for a file too that its library writes for the owner alone."""
    before = os.umask(umask)
    try:
        with whole_or_not(tmp_path / "file") as partial:
            partial.touch(0o600)
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


RACE = """import sys, warnings
from pathlib import Path
from export.files import whole_folder
warnings.simplefilter("error")
for turn in range(150):
    with whole_folder(Path(sys.argv[1])) as partial:
        (partial / "file").write_text(str(turn))
        assert (partial / "file").read_text() == str(turn)"""


@pytest.mark.slow
def test_many_processes_make_one_folder(tmp_path: Path) -> None:
    """No process takes another's folder for abandoned, and all replaced folders are removed."""
    out, words = tmp_path / "made", [sys.executable, "-c", RACE]
    started = [subprocess.Popen([*words, str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in started:
        _, complained = process.communicate()
        assert process.returncode == 0, complained
    assert (out / "file").read_text() == "149"
    with whole_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_exchange_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two names cannot be swapped in one step: NAME.old, from which load and build recover."""
    monkeypatch.setattr("export.files._swap", lambda a, b: False)
    new, old = tmp_path / "new", tmp_path / "engine"
    for folder in (new, old):
        folder.mkdir()
        (folder / MANIFEST).write_text(folder.name)
    exchange(new, old)
    assert (old / MANIFEST).read_text() == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["engine"]
    os.rename(old, tmp_path / "engine.old")  # killed between the renames
    with open_staging(old):
        assert (old / MANIFEST).read_text() == "new"
