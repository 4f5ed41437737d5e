"""Claims about where weights come from: shards, variants, base models by reference, the hub; and never from pickles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export.checkpoint import Checkpoint
from export.checkpoint.folders import _wanted
from realisid_trt.errors import CheckpointError
from tests.export.checkpoint.bad_checkpoints import UNET, edit


def same_weights(one: Path, other: Path, part: str = "unet") -> bool:
    a, b = (Checkpoint.open(path)._load(part, torch.float16).state_dict() for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_shards_as_both_libraries_write_them(copy: Callable[..., Path], made: dict[str, Path]) -> None:
    folder = copy()
    for part, size in (("unet", "1MB"), ("text_encoder_2", "50KB")):
        module = Checkpoint.open(made["sdxl"])._load(part, torch.float32)
        shutil.rmtree(folder / part)
        module.save_pretrained(folder / part, max_shard_size=size)
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 2
        Checkpoint.open(folder).check_weights()
        assert same_weights(made["sdxl"], folder, part)


def test_a_variant_is_taken_where_there_is_one(copy: Callable[..., Path], made: dict[str, Path]) -> None:
    folder = copy()
    marked = Checkpoint.open(made["sdxl"]).load_unet(torch.float16)
    marked.conv_in.bias.fill_(3)
    marked.save_pretrained(folder / "unet", variant="fp16", max_shard_size="2MB")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    c = Checkpoint.open(folder, variant="fp16")
    c.check_weights()
    assert (c.components["unet"].variant, c.components["vae"].variant) == ("fp16", None)
    assert torch.all(c.load_unet().conv_in.bias == 3)
    assert not torch.any(Checkpoint.open(folder).load_unet().conv_in.bias == 3)
    (folder / "unet" / UNET).unlink()
    with pytest.raises(CheckpointError, match='Ask for what is there: variant="fp16"'):
        Checkpoint.open(folder)


# --- base models


@pytest.mark.parametrize("how", ["relative", "absolute", "argument"])
def test_a_base_model_by_reference(
    how: str, copy: Callable[..., Path], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = copy(), tmp_path / "models" / "base"
    base.mkdir(parents=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        (folder / part).rename(base / part)
    if how != "argument":
        reference = os.path.join("..", "models", "base") if how == "relative" else str(base)
        edit(folder / "model_index.json", base_model=reference)
    c = Checkpoint.open(folder, base_model=base if how == "argument" else None)
    assert c.components["unet"].folder == base / "unet" and c.tokenizer_folder("text_encoder_2") == base / "tokenizer_2"
    assert len(c.load_tokenizer("tokenizer")("a cat").input_ids) == 4
    assert c.weights_key("unet") == Checkpoint.open(made["sdxl"]).weights_key("unet")
    shutil.copytree(made["sdxl"] / "vae", folder / "vae")  # local files win
    assert c.base == base  # the workers get this path, so that they do not ask the hub again
    assert Checkpoint.open(folder, base_model=base).components["vae"].folder == folder / "vae"
    monkeypatch.chdir(tmp_path)
    assert Checkpoint.open(folder, base_model="models/base").components["unet"].folder == base / "unet"


def test_a_base_model_from_the_hubs_cache(
    copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own cache layout, read by the hub's own client, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder, cached = copy(), tmp_path / "hub" / "models--somebody--base"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    edit(folder / "model_index.json", base_model="somebody/base")
    (folder / "unet").rename(cached / "snapshots" / ("0" * 40) / "unet")
    c = Checkpoint.open(folder, local_files_only=True)
    assert c.components["unet"].folder.is_relative_to(cached)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, base_model="somebody/else", local_files_only=True)
    assert "is not in the local cache" in str(caught.value) and "hf download somebody/else" in str(caught.value)


def test_a_hub_that_cannot_be_reached(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = copy()
    shutil.rmtree(folder / "unet")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, base_model="somebody/base")
    for piece in ("somebody/base", "could not be downloaded", "Download it where there is a network", "--base-model"):
        assert piece in str(caught.value)


def test_of_a_hub_model_only_the_needed_files_are_asked_for() -> None:
    """The file list of SDXL's repository, shortened: one set of weights for each part, no pickles, no other formats."""
    names = [
        "model_index.json", "README.md", "sd_xl_base_1.0.safetensors", "unet/config.json", "unet/model.onnx",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/model.fp16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json", "text_encoder/flax_model.msgpack", "tokenizer/merges.txt",
        "tokenizer/vocab.json", "vae_1_0/config.json",
    ]  # fmt: skip
    assert set(_wanted(names, ("unet", "vae", "text_encoder", "tokenizer"), "fp16")) == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.fp16.json",
        "tokenizer/merges.txt", "tokenizer/vocab.json",
    }  # fmt: skip
    assert "unet/diffusion_pytorch_model.safetensors" in _wanted(names, ("unet",), None)


# --- pickles


def test_pickles_are_refused_and_the_sentence_that_converts_them_works(
    copy: Callable[..., Path], made: dict[str, Path]
) -> None:
    folder = copy()
    torch.save(load_file(folder / "unet" / UNET), folder / "unet" / "diffusion_pytorch_model.bin")
    Checkpoint.open(folder)  # a pickle beside safetensors is not read, and does no harm
    (folder / "unet" / UNET).unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert "Pickles are refused" in str(caught.value) and "if you trust its source" in str(caught.value)
    command = str(caught.value).split("if you trust its source: ")[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # its `python` runs these tests
    subprocess.run(["bash", "-c", command], check=True, env={**os.environ, "PATH": path})
    assert same_weights(made["sdxl"], folder)
