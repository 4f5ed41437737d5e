"""Claims about the folder: whole or not at all, and never at another folder's cost."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from export import miniature
from export.checkpoint import Checkpoint
from export.files import whole_folder
from export.miniature import make_checkpoint
from export.miniature.weights import write_weights
from realisid_trt.errors import DiskError, RequestError
from tests.export.miniature.digests import digests


def test_only_a_checkpoint_of_ours_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    out = make_checkpoint(tmp_path / "made")
    before = digests(out)
    with pytest.raises(RequestError, match="exists. Replace it with --force"):
        make_checkpoint(out, seed=1)
    assert digests(out) == before
    make_checkpoint(out, seed=1, force=True)
    assert digests(out) != before

    index = json.loads((out / "model_index.json").read_text())
    del index["_made_by"]  # now it could be somebody's trained model
    (out / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for precious in (out, tmp_path / "notes", tmp_path / "notes" / "thesis.txt"):
        with pytest.raises(RequestError, match="never overwritten"):
            make_checkpoint(precious, force=True)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    Checkpoint.open(make_checkpoint(tmp_path / "empty"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "made", "notes"]  # nothing left over


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "made").symlink_to(tmp_path / "disk" / "made")
    for seed in (0, 1):
        assert make_checkpoint(tmp_path / "made", seed=seed, force=True) == tmp_path / "disk" / "made"
    assert (tmp_path / "made").is_symlink() and (tmp_path / "made" / "model_index.json").is_file()
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["made"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_what_was_there(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_checkpoint(tmp_path / "made")
    before = digests(out)
    calls = []

    def fail(folder: Path, *args: Any, **kwargs: Any) -> None:
        calls.append(folder)
        if len(calls) == 3:
            raise error
        write_weights(folder, *args, **kwargs)

    monkeypatch.setattr(miniature, "write_weights", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DiskError) as caught:
        make_checkpoint(out, seed=1, force=True)
    assert isinstance(error, KeyboardInterrupt) or f"the disk of {tmp_path} is full" in str(caught.value)
    assert digests(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_weights_that_the_system_refuses_to_write_leave_what_was_there(tmp_path: Path) -> None:
    """With a limit on the size of files. safetensors reports it in an exception of its own, without errno."""
    out = make_checkpoint(tmp_path / "made")
    before = digests(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"made could not be written: .*File too large.*choose another --out"):
            make_checkpoint(out, seed=1, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert digests(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Files that a running process writes stay."""
    (tmp_path / ".made.7-abandoned.part").mkdir()
    with whole_folder(tmp_path / "made") as living:
        make_checkpoint(tmp_path / "made")
        assert {entry.name for entry in tmp_path.iterdir()} == {"made", living.name}
        shutil.copytree(tmp_path / "made", living, dirs_exist_ok=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"made"}


def test_the_disk_is_asked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**11, 10**11 - 10**10, 10**10))
    with pytest.raises(DiskError, match=r"preset sdxl needs about 13\.3 GB and .* has 10\.0 GB free\. Free some space"):
        make_checkpoint(tmp_path / "made", preset="sdxl")
    assert not list(tmp_path.iterdir())
