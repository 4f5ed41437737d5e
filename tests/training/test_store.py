"""Examples that are made in several sittings: the same bytes, nothing made twice, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from numpy.typing import DTypeLike

from export.checkpoint import Checkpoint
from export.files import locked
from export.miniature import make_checkpoint
from realisid_trt.errors import DiskError, RequestError
from training import latents, store
from training.examples import WorldScenes
from training.latents import latents_of
from training.store import LeftOut, Store, store_of

NUMBER, STOPPED_AT = 23, 13


class Numbers:
    """NUMBER small examples, of which every fifth is left out. asked: the ones that were made here."""

    def __init__(self, scale: int = 1, stop: Callable[[], None] | None = None) -> None:
        self.scale, self.stop, self.asked = scale, stop, list[int]()

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        return {"square": ((3, 2), np.float32), "number": ((), np.uint8), "none": ((0, 2), np.uint8)}

    def __len__(self) -> int:
        return NUMBER

    def __getitem__(self, index: int) -> Mapping[str, Any] | LeftOut:
        if self.stop and index == STOPPED_AT:
            self.stop()
        self.asked.append(index)
        if index % 5 == 4:
            return LeftOut(f"number {index}", "a fifth")
        square = np.full((3, 2), index * self.scale)
        return {"square": square, "number": index, "none": np.zeros((0, 2)), "caption": f"“{index}”\n"}

    def describe(self) -> dict[str, Any]:
        return {"source": "numbers", "scale": self.scale}


@pytest.fixture(autouse=True)
def small_sittings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RECORD_EVERY", 4)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def killed(out: Path, scale: int = 1) -> None:
    """A process that makes a store and is killed at STOPPED_AT."""
    if not (child := os.fork()):
        store_of(Numbers(scale, lambda: os.kill(os.getpid(), signal.SIGKILL)), out)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def beside(folder: Path) -> Iterator[str]:
    return (file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = content(store_of(Numbers(), tmp_path / "whole").path)
    killed(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    again = Numbers()
    made = store_of(again, tmp_path / "store")
    assert again.asked == list(range(STOPPED_AT // 4 * 4, NUMBER))
    assert content(made.path) == whole and sorted(beside(tmp_path)) == ["store", "whole"]
    assert made["number"].tolist() == [index for index in range(NUMBER) if index % 5 != 4]
    assert made["square"].shape == (19, 3, 2) and made.captions[4] == "“5”\n" and len(made.left_out) == 4


@pytest.mark.parametrize("moment", ["_shorten", "write_json", "exchange"])
def test_a_store_that_is_all_but_finished_is_finished(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(store_of(Numbers(), tmp_path / "whole").path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store, moment, stop)
        store_of(Numbers(), tmp_path / "store")
    assert content(store_of(Numbers(), tmp_path / "store").path) == whole


def test_what_was_begun_of_others_or_torn_is_begun_again(tmp_path: Path) -> None:
    killed(tmp_path / "store", scale=2)
    again = Numbers()
    made = store_of(again, tmp_path / "store")
    assert len(again.asked) == NUMBER and made["square"].max() == 22
    killed(tmp_path / "torn")
    record = tmp_path / ".torn.making" / store.RECORD
    record.write_bytes(record.read_bytes()[:-3])  # the machine stopped in the middle of a line
    again = Numbers()
    assert content(store_of(again, tmp_path / "torn").path) == content(made.path)
    assert again.asked == list(range(STOPPED_AT // 4 * 4 - 1, NUMBER))


def test_two_at_once_and_a_disk_without_room_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / ".store.lock", RequestError()), pytest.raises(RequestError, match="another process is mak"):
        store_of(Numbers(), tmp_path / "store")
    usage = shutil.disk_usage(tmp_path)._replace(free=NUMBER * 25 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DiskError, match="all examples needs about"):
        store_of(Numbers(), tmp_path / "store")
    assert not list(beside(tmp_path))


def test_latents_go_on_where_they_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "start", preset="world"))
    pictures = store_of(WorldScenes(pictures=7, persons=(1,)), tmp_path / "store")
    other = Store(shutil.copytree(pictures.path, tmp_path / "other"))
    monkeypatch.setattr(latents, "BATCH_PIXELS", 2 * 128 * 128)
    whole = latents_of(checkpoint, pictures, accelerator)
    encode, calls = latents._latents, list[int]()

    def counted(vae: Any, rgb: Any, accelerator: Accelerator) -> Any:
        calls.append(len(rgb))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(vae, rgb, accelerator)

    monkeypatch.setattr(latents, "_latents", counted)
    stale = other.path / ".latents-0000-fp32.npy.1234.part"
    stale.write_bytes(b"of another VAE")
    with pytest.raises(KeyboardInterrupt):
        latents_of(checkpoint, other, accelerator)
    [part] = other.path.glob("*.part")
    assert part != stale and np.isnan(np.load(part)).any(axis=(1, 2, 3)).tolist() == [False] * 4 + [True] * 3
    with locked(other.path / ".latents.lock", RequestError()), pytest.raises(RequestError, match="another run is enc"):
        latents_of(checkpoint, other, accelerator)
    calls[:] = [0, 0, 0]
    assert np.array_equal(latents_of(checkpoint, other, accelerator), whole)
    assert calls == [0, 0, 0, 2, 1] and not list(other.path.glob("*.part"))
    names = [next(folder.glob(".latents-*.npy")) for folder in (pictures.path, other.path)]
    assert names[0].read_bytes() == names[1].read_bytes()
    # a file that a killed run had not finished laying out is laid out again
    os.rename(names[1], part)
    os.truncate(part, part.stat().st_size - 1)
    assert np.array_equal(latents_of(checkpoint, other, accelerator), whole)


def test_a_store_is_made_once_and_is_what_it_says(tmp_path: Path) -> None:
    store = store_of(WorldScenes(pictures=5, persons=(2,)), tmp_path / "store")
    written = (tmp_path / "store" / "rgb.npy").stat().st_mtime_ns
    again = store_of(WorldScenes(pictures=5, persons=(2,)), tmp_path / "store")
    assert (tmp_path / "store" / "rgb.npy").stat().st_mtime_ns == written
    assert store.captions == again.captions and len(again) == 5
    one = WorldScenes(pictures=5, persons=(2,))[3]
    assert np.array_equal(again["rgb"][3], one["rgb"]) and again.captions[3] == one["caption"]
    assert np.array_equal(again["landmarks"][3], one["landmarks"]) and one["num_persons"] == 2
    with pytest.raises(RequestError, match=r"holds other examples \(seed\)"):
        store_of(WorldScenes(pictures=5, persons=(2,), seed=1), tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(RequestError, match="format 99"):
        Store(tmp_path / "store")
