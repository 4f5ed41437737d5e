"""Claims about the keys by which a build knows what is stale: contents count, and are read once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint, files
from tests.export.checkpoint.bad_checkpoints import UNET, edit, put

NAMES = ("unet", "vae", "id_projection", "null_id", "scheduler", "tokenizer")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of file hashes, for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files._sha256.cache_clear()
    return tmp_path / "cache" / "realisid_trt" / "verified.json"


def add_one(file: Path, key: str) -> None:
    tensors = load_file(file)
    tensors[key].add_(1)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def test_weights_keys_follow_the_contents_and_nothing_else(copy: Callable[..., Path], made: dict[str, Path]) -> None:
    folder = copy()
    before = {name: Checkpoint.open(made["sdxl"]).weights_key(name) for name in NAMES}
    edit(folder / "unet" / "config.json", _diffusers_version="0.0.1", _name_or_path="elsewhere")
    c = Checkpoint.open(folder)
    assert {name: c.weights_key(name) for name in NAMES} == before
    assert len(set(before.values())) == len(NAMES) and all(len(key) == 64 for key in before.values())

    def changed() -> set[str]:
        checkpoint = Checkpoint.open(folder)
        return {name for name in NAMES if checkpoint.weights_key(name) != before[name]}

    add_one(folder / "unet" / UNET, "conv_in.bias")
    assert changed() == {"unet"}
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    assert changed() == {"unet", "vae"}
    add_one(folder / "id_projection" / "model.safetensors", "proj.bias")
    assert changed() == {"unet", "vae", "id_projection", "null_id"}
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0)
    put(folder / "tokenizer" / "merges.txt", "#version: 0.2\n")
    assert changed() == set(NAMES)


def test_another_process_takes_the_hash_from_the_memory(made: dict[str, Path], cache: Path) -> None:
    c = Checkpoint.open(made["sdxl"])
    key = c.weights_key("unet")
    memory = json.loads(cache.read_text())
    assert [entry.split("|")[0] for entry in memory] == [str((made["sdxl"] / "unet" / UNET).resolve())]
    files._sha256.cache_clear()  # another process begins with this
    assert c.weights_key("unet") == key
    cache.write_text(json.dumps(dict.fromkeys(memory, "0" * 64)))
    files._sha256.cache_clear()
    assert c.weights_key("unet") != key  # the recorded hash was used, so the file was not read


def test_a_file_altered_under_the_same_size_and_time_is_noticed(copy: Callable[..., Path]) -> None:
    folder = copy()
    file, key = folder / "vae" / UNET, Checkpoint.open(folder).weights_key("vae")
    content, times = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    put(file, bytes(content))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Checkpoint.open(folder).weights_key("vae") != key


def test_a_memory_that_cannot_be_written_changes_no_key(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    c = Checkpoint.open(made["sdxl"])
    key = c.weights_key("unet")
    files._sha256.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert [c.weights_key("unet"), c.weights_key("unet")] == [key, key]
    assert files._sha256.cache_info().misses == 1  # and the file is still read only once
