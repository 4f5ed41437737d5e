"""Checkpoints of ID-Patch: a face encoder and two projections in the place of an image encoder and one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.checkpoint import Checkpoint
from realisid_trt.errors import CheckpointError
from tests.export.checkpoint.bad_checkpoints import config, edit


def realisid_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "realisid_config.json", **changes)


def test_its_folders_and_facts(made: dict[str, Path]) -> None:
    c = Checkpoint.open(made["idpatch"])
    c.check_weights()
    assert set(c.components) == {
        "unet", "vae", "text_encoder", "text_encoder_2", "controlnet_id_patch", "id_projection", "id_patch_projection",
    }  # fmt: skip
    assert c.face_encoder is not None and (c.face_encoder.norm, c.face_encoder.colour) == ("unit", "bgr")
    assert (c.image_size, c.image_mean, c.num_id_tokens, c.has_patches) == (0, (), 16, True)
    assert [c.token_limits(persons) for persons in (0, 1, 2, 8)] == [(77, 77), (77, 93), (77, 109), (77, 205)]
    assert Checkpoint.open(made["sdxl"]).token_limits(2) is None and not Checkpoint.open(made["sdxl"]).has_patches
    assert c.scheduler_config["set_alpha_to_one"] is True  # Euler's last step, as the weights were published for


@torch.no_grad()
def test_its_projections_make_tokens_and_patches(made: dict[str, Path]) -> None:
    c = Checkpoint.open(made["idpatch"])
    embedding = torch.randn(2, 1, 512)
    assert c.load_id_projection()(embedding).shape == (2, 16, c.cross_attention_dim)
    patches = c.load_patch_projection()
    assert patches(embedding).shape == (2, 3, 64 * 64)
    assert c.load_patch_projection(torch.float16).state_dict()["latents"].dtype == torch.float16
    file = load_file(made["idpatch"] / "id_patch_projection" / "model.safetensors")
    assert all(torch.equal(value, file[key]) for key, value in patches.state_dict().items())


@torch.no_grad()
def test_a_dropped_id_is_the_projection_of_zeros(made: dict[str, Path], copy: Callable[..., Path]) -> None:
    c = Checkpoint.open(made["idpatch"])
    null = c.null_id_tokens()
    assert torch.equal(null, c.load_id_projection()(torch.zeros(1, 1, 512))[0])
    assert null.abs().max() > 0.1  # biases, queries and a LayerNorm: not zeros
    folder = copy("idpatch")
    edit(folder / "realisid_config.json", null_id="zero_tokens")
    other = Checkpoint.open(folder)
    assert torch.equal(other.null_id_tokens(), torch.zeros(16, c.cross_attention_dim))
    assert other.weights_key("null_id") != c.weights_key("null_id")


def test_a_table_without_patches_needs_no_projection_of_them(copy: Callable[..., Path]) -> None:
    folder = copy("idpatch")
    shutil.rmtree(folder / "id_patch_projection")
    row = {"name": "id_patch", "condition": "pose", "style": "openpose-mmpose", "tokens": "text_and_id"}
    edit(folder / "realisid_config.json", branches=[{**row, "pooled": "per_row"}], patch_px=None)
    c = Checkpoint.open(folder)
    assert not c.has_patches and "id_patch_projection" not in c.components


def test_the_key_of_the_face_encoder_is_that_of_its_files(made: dict[str, Path], copy: Callable[..., Path]) -> None:
    folder = copy("idpatch")
    before = Checkpoint.open(folder).weights_key("face_encoder")
    assert before == Checkpoint.open(made["idpatch"]).weights_key("face_encoder")
    edit(folder / "face_encoder" / "config.json", norm="raw")
    assert Checkpoint.open(folder).weights_key("face_encoder") != before


# name → (what is done to a good checkpoint, pieces of the error)
BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no face encoder": (
        lambda p: shutil.rmtree(p / "face_encoder"),
        ("face_encoder is missing. realisid_config.json makes it a part of the checkpoint",),
    ),
    "no projection of patches": (
        lambda p: shutil.rmtree(p / "id_patch_projection"),
        ("id_patch_projection is missing. realisid_config.json makes it a part of the checkpoint",),
    ),
    "the published pickle": (
        lambda p: (p / "id_projection" / "model.safetensors").rename(p / "id_projection" / "id-patch.bin"),
        ("id_projection holds id-patch.bin", "Pickles are refused", "python -m export.adopt idpatch --weights FOLDER"),
    ),
    "projections swapped": (
        lambda p: (
            (p / "id_projection").rename(p / "x"),
            (p / "id_patch_projection").rename(p / "id_projection"),
            (p / "x").rename(p / "id_patch_projection"),
        ),
        ("id_projection/config.json: output_dim is 4096, expected 64, the branches' cross_attention_dim",),
    ),
    "width of the tokens' embedding": (
        config("id_projection", embedding_dim=256),
        (
            "id_projection/config.json: embedding_dim is 256, expected 512, the face encoder's output_dim",
            "trained with",
        ),
    ),
    "width of the patches' embedding": (
        config("id_patch_projection", embedding_dim=256),
        ("id_patch_projection/config.json: embedding_dim is 256, expected 512, the face encoder's output_dim",),
    ),
    "four colours": (
        config("id_patch_projection", num_queries=4),
        ("id_patch_projection/config.json: num_queries is 4, expected 3, one for each colour of a patch",),
    ),
    "another side": (
        realisid_config(patch_px=32),
        ("id_patch_projection/config.json: output_dim is 4096, expected 1024: a patch of 32 x 32 px", "patch_px"),
    ),
    "a linear projection of patches": (
        lambda p: (p / "id_patch_projection" / "config.json").write_text(
            json.dumps({"class": "linear", "input_dim": 512, "output_dim": 4096})
        ),
        ("id_patch_projection/config.json: class is 'linear', expected \"resampler\", with one query",),
    ),
    "many tokens of a linear projection": (
        lambda p: (p / "id_projection" / "config.json").write_text(
            json.dumps({"class": "linear", "input_dim": 512, "output_dim": 64, "num_tokens": 16})
        ),
        ("id_projection/config.json: num_tokens is 16, expected 1: a linear projection gives one token",),
    ),
    "another encoder": (
        lambda p: (p / "face_encoder" / "arcface.onnx").write_bytes(bytes(2000)),
        ("arcface.onnx has the hash", "Copy the whole folder again"),
    ),
    "grey conditions": (
        config("controlnet_id_patch", conditioning_channels=1),
        ("conditioning_channels is 1, expected 3, since its condition is a drawing with the patches of IDs",),
    ),
    "an image's null ID": (
        realisid_config(null_id="zero_image"),
        ('null_id is "zero_image", and id_input "aligned_face" has no image encoder', '"zero_embedding"'),
    ),
    "no side of a patch": (realisid_config(patch_px=None), ("shown ID patches, which need",)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_contradicts_is_refused(name: str, copy: Callable[..., Path]) -> None:
    folder = copy("idpatch")
    for small in ("id_projection", "id_patch_projection", "face_encoder"):  # hard links must not be written through
        for file in (folder / small).iterdir():
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
    spoil, pieces = BAD[name]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    for piece in pieces:
        assert piece in str(caught.value)
