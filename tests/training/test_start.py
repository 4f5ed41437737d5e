"""The user's base model → a RealisID checkpoint that makes the base's pictures until it is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from export.truth.reference import Reference, ReferencePerson
from training.start import main


@pytest.mark.parametrize("options", [{"preset": "world"}, {"family": "sd15", "vae_factor": 8}], ids=["sdxl", "sd15"])
@pytest.mark.parametrize("projection", ["linear", "resampler"])
def test_a_new_checkpoint_makes_the_bases_pictures(tmp_path: Path, options: dict[str, str], projection: str) -> None:
    """Zero convolutions: for any person at any place, the latents are exactly those of plain text-to-image."""
    base = make_checkpoint(tmp_path / "base", **options)
    for own in ("controlnet_local", "controlnet_global", "id_projection", "realisid_config.json"):
        path = base / own
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out = tmp_path / "checkpoints" / "mine"
    arguments = ["--base", str(base), "--image-encoder", str(base), "--out", str(out), "--projection", projection]
    assert main(arguments) == 0
    checkpoint = Checkpoint.open(out)
    checkpoint.check_weights()
    assert not (out / "unet").exists()
    reference = Reference(checkpoint)
    size = checkpoint.sample_size * checkpoint.vae_scale_factor
    latents = torch.randn(1, 4, checkpoint.sample_size, checkpoint.sample_size, generator=torch.manual_seed(0))
    pixels = torch.randn(3, checkpoint.image_size, checkpoint.image_size)
    somebody = ReferencePerson(torch.rand(3, size, size), (0, 0, size / 2, size / 2), pixels)
    made = [
        reference.generate("a person", persons, latents, num_inference_steps=2, subject_conditioning_ratio=None)
        for persons in ([], [somebody])
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_an_image_encoder_as_ip_adapter_publishes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: bool
) -> None:
    """config.json, model.safetensors and a pickle, no feature extractor: CLIP's own is used, with a warning."""
    base = make_checkpoint(tmp_path / "base", preset="world")
    source = tmp_path / "sdxl_models"
    encoder = source / "image_encoder"
    encoder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / "image_encoder" / name, encoder)
    (encoder / "pytorch_model.bin").write_bytes(b"a pickle")
    given, out = encoder if inside else source, tmp_path / "mine"
    (tmp_path / ".mine.4194305.part").mkdir()  # of a killed run: no process has so high a number
    assert main(["--base", str(base), "--image-encoder", str(given), "--out", str(out)]) == 0
    assert "normalised as CLIP does" in capsys.readouterr().err
    checkpoint = Checkpoint.open(out)
    assert checkpoint.feature_extractor == Checkpoint.open(base).feature_extractor
    assert sorted(file.name for file in (out / "image_encoder").iterdir()) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.glob(".mine*"))
    # an encoder with its own preprocessor_config.json keeps it
    (encoder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    assert main(["--base", str(base), "--image-encoder", str(given), "--out", str(tmp_path / "told")]) == 0
    assert "CLIP does" not in capsys.readouterr().err
    assert Checkpoint.open(tmp_path / "told").feature_extractor["image_mean"] == [0.5] * 3
    (encoder / "model.safetensors").unlink()
    assert main(["--base", str(base), "--image-encoder", str(given), "--out", str(tmp_path / "no")]) == 1
    assert "Pickles are refused" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_weights_in_half_precision_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = make_checkpoint(tmp_path / "base", preset="world"), tmp_path / "mine"
    for file in sorted(base.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    arguments = ["--base", str(base), "--image-encoder", str(base), "--out", str(out)]
    assert main(arguments) == 1
    assert 'variant="fp16"' in capsys.readouterr().err and not out.exists()
    assert main([*arguments, "--variant", "fp16"]) == 0
    assert f"--checkpoint {out} --variant fp16" in capsys.readouterr().out
    Checkpoint.open(out, variant="fp16").check_weights()


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_checkpoint(tmp_path / "base", preset="world")
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "mine")]
    assert main(["--base", str(base), "--image-encoder", str(tmp_path / "empty"), *out]) == 1
    assert "empty holds no config.json, and no image_encoder/ with one" in capsys.readouterr().err
    assert main(["--base", str(tmp_path / "empty"), "--image-encoder", str(base), *out]) == 1
    assert "config.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists() and not list(tmp_path.glob(".mine*"))
    assert main(["--base", str(base), "--image-encoder", str(base), "--out", str(base)]) == 2
    assert "exists. Choose another --out." in capsys.readouterr().err
