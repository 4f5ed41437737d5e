"""Claims about bad checkpoints: every contradiction is named, and nothing but a CheckpointError comes out."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint
from realisid_trt.errors import CheckpointError
from tests.export.checkpoint.bad_checkpoints import BAD_CHECKPOINTS, BAD_WEIGHTS, UNET, Tensors, edit, put
from tests.export.checkpoint.bad_schedules import BAD_SCHEDULES

BAD = BAD_CHECKPOINTS | BAD_SCHEDULES


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_refused_with_a_sentence_that_helps(name: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    spoil, pieces = BAD[name]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    for piece in pieces:
        assert piece in str(caught.value)
    assert str(caught.value).endswith(".") or "python -c" in str(caught.value)


def test_whatever_stands_behind_a_key_only_a_checkpoint_error_comes_out(copy: Callable[..., Path]) -> None:
    """Every key of every JSON file, with values of impossible kinds."""
    folder = copy("file")
    tried = 0
    for file in (*folder.glob("*.json"), *folder.glob("*/*config.json")):
        text = file.read_text()
        for key, odd in itertools.product(json.loads(text), ({"odd": [None]}, -0.5)):
            edit(file, **{key: odd})
            with contextlib.suppress(CheckpointError):
                Checkpoint.open(folder, local_files_only=True).weights_key("scheduler")
            tried += 1
        put(file, text)
    assert tried > 400
    Checkpoint.open(folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist, expected a checkpoint's folder.*export.miniature"):
        Checkpoint.open(tmp_path / "nothing")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(CheckpointError, match="model.ckpt is a file, expected a checkpoint's folder"):
        Checkpoint.open(tmp_path / "model.ckpt")


# --- what the system refuses


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything; the user in this block is not root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("what", ["unet/" + UNET, "unet/config.json", "vae", "tokenizer/vocab.json"])
def test_what_may_not_be_read_is_named(what: str, made: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        os.chmod(place, 0o755)
        folder = Path(shutil.copytree(made["sdxl"], Path(place) / "checkpoint"))
        Checkpoint.open(folder)
        mode = (folder / what).stat().st_mode
        (folder / what).chmod(0)
        with without_privileges(), pytest.raises(CheckpointError) as caught:
            Checkpoint.open(folder)
        (folder / what).chmod(mode)
    assert str(caught.value).startswith(f"{folder / what}")
    assert "cannot be read (Permission denied). Get the right to read it (chmod -R u+rX" in str(caught.value)


def test_weights_that_vanish_after_opening_are_named(copy: Callable[..., Path]) -> None:
    folder = copy("file")
    c = Checkpoint.open(folder)
    for file in (folder / "id_projection" / "model.safetensors", folder / "null_id.safetensors"):
        file.unlink()
    reads = (
        lambda: c.weights_key("id_projection"),
        lambda: c.weights_bytes("id_projection"),
        c.load_id_projection,
        c.check_weights,
        c.null_id_tokens,
    )
    for read in reads:
        with pytest.raises(CheckpointError, match="safetensors cannot be read"):
            read()


# --- weights that do not fit


def change_weights(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_must_have_exactly_the_keys_of_their_config(name: str, copy: Callable[..., Path]) -> None:
    part, change, pieces = BAD_WEIGHTS[name]
    folder = copy()
    change_weights(next((folder / part).glob("*.safetensors")), change)
    c = Checkpoint.open(folder)
    loads = {"id_projection": c.load_id_projection}.get(part, lambda: c._load(part, torch.float32))
    for check in (c.check_weights, loads):  # from the headers, and again by the library that loads
        with pytest.raises(CheckpointError) as caught:
            check()
        for piece in (str(folder / part), *pieces, "Copy config.json and weights from the same place"):
            assert piece in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "key"), [("unet", "conv_in.weight"), ("id_projection", "norm.weight"),
                                           ("text_encoder", None), ("vae", None)])  # fmt: skip
def test_broken_numbers_are_named(part: str, key: str | None, value: float, copy: Callable[..., Path]) -> None:
    folder, named = copy(), []

    def spoil(weights: Tensors) -> None:
        named.append(key or next(name for name in weights if weights[name].is_floating_point()))
        weights[named[0]].flatten()[0] = value

    change_weights(file := next((folder / part).glob("*.safetensors")), spoil)
    c = Checkpoint.open(folder)
    load = {"id_projection": c.load_id_projection, "vae": c.load_vae}.get(part, lambda: c._load(part, torch.float32))
    with pytest.raises(CheckpointError, match=r"holds 1 NaN or infinite of .* Copy the file again") as caught:
        load()
    assert str(file) in str(caught.value) and named[0].removeprefix("text_model.") in str(caught.value)


def test_a_model_in_one_file_becomes_a_folder(tmp_path: Path, copy: Callable[..., Path]) -> None:
    file, folder = tmp_path / "sd xl.safetensors", copy()
    save_file({"x": torch.zeros(1)}, file)
    shutil.rmtree(folder / "unet")
    said = r"is a file, expected a.*folder.*from_single_file.*save_pretrained"
    for open_it in (lambda: Checkpoint.open(file), lambda: Checkpoint.open(folder, base_model=file)):
        with pytest.raises(CheckpointError, match=said) as caught:
            open_it()
        assert f"'{file}' '{file.with_suffix('')}'" in str(caught.value)


def test_position_ids_of_old_clip_files_are_no_surplus(copy: Callable[..., Path]) -> None:
    folder = copy()
    position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    change_weights(folder / "text_encoder" / "model.safetensors", lambda w: w.update(position_ids))
    c = Checkpoint.open(folder)
    c.check_weights()
    c.load_text_encoder("text_encoder")


def test_a_type_that_torch_does_not_have_is_named(copy: Callable[..., Path]) -> None:
    file = copy() / "id_projection" / "model.safetensors"
    put(file, file.read_bytes().replace(b'"F32"', b'"X32"'))
    with pytest.raises(CheckpointError, match="id_projection/model.safetensors cannot be read as safetensors"):
        Checkpoint.open(file.parent.parent).load_id_projection()
