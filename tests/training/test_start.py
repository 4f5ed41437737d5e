"""A base model of one's own → a RealisID checkpoint that makes the base's pictures, until it is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from export.reference import Reference, ReferencePerson
from training.start import main


@pytest.mark.parametrize("options", [{"preset": "world"}, {"family": "sd15", "vae_factor": 8}], ids=["sdxl", "sd15"])
@pytest.mark.parametrize("projection", ["linear", "resampler"])
def test_a_new_checkpoint_makes_the_bases_pictures(tmp_path: Path, options: dict[str, str], projection: str) -> None:
    """Zero convolutions: whoever is asked for, wherever, the latents are those of plain text-to-image, exactly."""
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


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_checkpoint(tmp_path / "base", preset="world")
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "mine")]
    assert main(["--base", str(base), "--image-encoder", str(tmp_path / "empty"), *out]) == 1
    assert "image_encoder is missing" in capsys.readouterr().err
    assert main(["--base", str(tmp_path / "empty"), "--image-encoder", str(base), *out]) == 1
    assert "config.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists() and not list(tmp_path.glob(".mine*"))
    assert main(["--base", str(base), "--image-encoder", str(base), "--out", str(base)]) == 2
    assert "exists. Choose another --out." in capsys.readouterr().err
