"""Claims about recipes: presets of the real shapes, and refusals of recipes that cannot be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.miniature import make_checkpoint, modules_of, recipe_of
from realisid_trt.errors import RequestError


def parameters(preset: str) -> dict[str, int]:
    modules = modules_of(recipe_of(preset=preset), Path())
    return {name: sum(p.numel() for p in module.parameters()) for name, (_, module) in modules.items()}


def test_the_full_size_preset_is_sdxl_with_ip_adapters_image_encoder() -> None:
    assert parameters("sdxl") == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "image_encoder": 632_076_800,
        "controlnet_local": 1_251_014_160,
        "controlnet_global": 1_251_013_872,
        "id_projection": 1280 * 2048 + 3 * 2048,
    }
    assert recipe_of(preset="sdxl").image_tokens == 257


def test_the_middle_preset_has_about_116_million_parameters_in_its_unet() -> None:
    assert 115e6 < parameters("mid")["unet"] < 117e6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"preset": "huge"}, "preset is 'huge', expected one of miniature, world, mid, sdxl"),
        ({"seed": -1}, "seed is -1, expected a whole number"),
        ({"family": "sd15", "preset": "mid"}, "preset mid has SDXL's shape. Use --family sdxl"),
        ({"preset": "sdxl", "vae_factor": 4}, "whose factor is 8. Leave --vae-factor out"),
        ({"projection": "linear", "id_tokens": 77}, "one token per image token: 65. Use --projection resampler"),
        ({"id_tokens": 0}, "id_tokens is 0, expected a whole number of at least 1"),
        ({"id_tokens": "77"}, "id_tokens is '77', expected a whole number of at least 1"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"vae_factor": 4.0}, "vae_factor is 4.0, expected one of None, 4, 8"),
        ({"guidance_scale": float("inf")}, "options: guidance_scale is inf, expected a finite number. Give another"),
        ({"face_margin": float("nan")}, "options: face_margin is nan, expected a number from 0.5 to 4"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, expected a whole number of at least 1"),
        ({"box_snap": 5}, "box_snap is 5, expected 4 or 16"),
        ({"null_id": "nothing"}, "null_id is 'nothing', expected one of zero_image"),
        ({"vae_faktor": 4}, "unknown option vae_faktor. Known: box_snap"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        make_checkpoint(tmp_path / "made", **options)
    assert sentence in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_numbers_may_be_numpys() -> None:
    recipe = recipe_of(seed=np.int64(3), guidance_scale=np.float32(2.5), num_inference_steps=np.int32(12))
    assert recipe == recipe_of(seed=3, guidance_scale=2.5, num_inference_steps=12)
    assert [type(recipe.seed), type(recipe.realisid.guidance_scale)] == [int, float]  # JSON knows no others
