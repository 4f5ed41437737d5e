"""Claims about good checkpoints: every family opens, facts are read from the configs, weights arrive unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from export.checkpoint import Checkpoint, tokenizer_of
from export.checkpoint.checks import residual_shapes
from export.checkpoint.classes import quiet
from realisid_trt.loop.samplers import table_of
from tests.export.checkpoint.bad_checkpoints import UNET, edit, put


def test_the_facts_are_read_from_the_configs(made: dict[str, Path]) -> None:
    c = Checkpoint.open(made["sdxl"])
    assert (c.vae_scale_factor, c.levels, c.sample_size, c.latent_channels) == (4, 3, 32, 4)
    assert (c.has_added_conditions, c.pooled_dim, c.cross_attention_dim, c.emb_dim) == (True, 32, 64, 64)
    assert (c.image_size, c.num_id_tokens, c.config.box_snap) == (64, 65, 4)
    assert c.text_encoder_names == ("text_encoder", "text_encoder_2")
    assert c.image_mean == (0.48145466, 0.4578275, 0.40821073) and len(c.image_std) == 3
    small = Checkpoint.open(made["sd15"])
    assert (small.vae_scale_factor, small.levels, len(small.residuals), small.config.box_snap) == (8, 4, 13, 8)
    assert (small.has_added_conditions, small.pooled_dim, small.text_encoder_names) == (False, 0, ("text_encoder",))


def test_the_length_of_a_prompt_is_the_text_encoders(copy: Callable[..., Path]) -> None:
    folder = copy()
    assert Checkpoint.open(folder).max_length == 77
    for name in ("text_encoder", "text_encoder_2"):
        edit(folder / name / "config.json", max_position_embeddings=40)
    assert Checkpoint.open(folder).max_length == 40
    for name in ("text_encoder", "text_encoder_2"):
        edit(folder / name / "config.json", max_position_embeddings=...)
    assert Checkpoint.open(folder).max_length == 77  # CLIP's own


@torch.no_grad()
def test_the_widths_of_the_text_encoders_are_those_of_what_they_give(copy: Callable[..., Path]) -> None:
    """A CLIPTextModelWithProjection projects its pooled output, a CLIPTextModel does not."""
    folder = copy()
    edit(folder / "text_encoder" / "config.json", projection_dim=48)
    for c in (Checkpoint.open(folder), Checkpoint.open(copy("sd15", folder.with_name("sd15")))):
        for name in c.text_encoder_names:
            out = c.load_text_encoder(name)(torch.zeros(1, c.max_length, dtype=torch.int64))
            pooled = out.text_embeds if name == "text_encoder_2" else out.pooler_output
            assert c.text_encoder_dims(name) == (out.last_hidden_state.shape[-1], pooled.shape[-1])


def test_the_size_of_a_component_is_that_of_its_weight_files(copy: Callable[..., Path]) -> None:
    folder = copy()
    whole = (folder / "unet" / UNET).stat().st_size
    module = Checkpoint.open(folder).load_unet(torch.float32)
    assert Checkpoint.open(folder).weights_bytes("unet") == whole
    (folder / "unet" / UNET).unlink()
    module.save_pretrained(folder / "unet", max_shard_size="1MB")
    shards = list((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert Checkpoint.open(folder).weights_bytes("unet") == sum(shard.stat().st_size for shard in shards)


def test_the_feature_extractors_facts_are_json(made: dict[str, Path]) -> None:
    c = Checkpoint.open(made["sdxl"])
    file = json.loads((made["sdxl"] / "feature_extractor" / "preprocessor_config.json").read_text())
    expected = {"image_size": 64, "image_mean": file["image_mean"], "image_std": file["image_std"]}
    assert json.loads(json.dumps(c.feature_extractor)) == expected


def test_every_text_encoder_has_a_tokenizer_of_its_own() -> None:
    assert [tokenizer_of(name) for name in ("text_encoder", "text_encoder_2")] == ["tokenizer", "tokenizer_2"]
    assert tokenizer_of("tokenizer_2") == "tokenizer_2"


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
@torch.no_grad()
def test_the_residuals_are_those_that_diffusers_makes(made: dict[str, Path], name: str) -> None:
    c = Checkpoint.open(made[name])
    side, pixels = c.sample_size, c.sample_size * c.vae_scale_factor
    added = {"text_embeds": torch.zeros(1, c.pooled_dim), "time_ids": torch.zeros(1, 6)}
    latents, tokens = torch.zeros(1, c.latent_channels, side, side), torch.zeros(1, 1, c.cross_attention_dim)
    for which, channels in (("local", 3), ("global", 1)):
        condition = torch.zeros(1, channels, pixels, pixels)
        branch = c.load_controlnet(which)
        skips, middle = branch(latents, 1, tokens, condition, added_cond_kwargs=added, return_dict=False)
        expected = tuple((channels, side >> level, side >> level) for channels, level in c.residuals)
        assert tuple(tuple(r.shape[1:]) for r in [*skips, middle]) == expected


def test_sdxls_residuals_are_the_ten_of_the_paper() -> None:
    shapes = residual_shapes({"block_out_channels": (320, 640, 1280), "layers_per_block": 2})
    assert shapes == ((320, 0),) * 3 + ((320, 1),) + ((640, 1),) * 2 + ((640, 2),) + ((1280, 2),) * 3
    assert len(residual_shapes({"block_out_channels": (8, 16), "layers_per_block": [1, 3]})) == 1 + 1 + 1 + 3 + 1


def test_modules_come_in_evaluation_mode_without_gradients_in_the_asked_type(made: dict[str, Path]) -> None:
    c = Checkpoint.open(made["sdxl"])
    c.check_weights()
    modules = {
        "unet": c.load_unet(torch.float16),
        "vae": c.load_vae(torch.float16),
        "image_encoder": c.load_image_encoder(torch.float16),
        "id_projection": c.load_id_projection(torch.float16),
        "controlnet_local": c.load_controlnet("local", torch.float16),
        "controlnet_global": c.load_controlnet("global", torch.float16),
        **{name: c.load_text_encoder(name, torch.float16) for name in c.text_encoder_names},
    }
    assert modules.keys() == c.components.keys()
    for name, module in modules.items():
        assert not any(part.training for part in module.modules()), name
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.float16, False)}, name
        file = load_file(next((made["sdxl"] / name).glob("*.safetensors")))
        loaded = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
        assert {key.removeprefix("text_model.") for key in file} == set(loaded), name
        assert all(torch.equal(value.half(), loaded[key.removeprefix("text_model.")]) for key, value in file.items())


def test_loading_leaves_the_libraries_and_torch_as_they_were(made: dict[str, Path], capfd: Any) -> None:
    transformers.logging.set_verbosity_info()
    try:
        before = torch.random.get_rng_state(), torch.get_default_dtype(), diffusers.logging.get_verbosity()
        c = Checkpoint.open(made["sdxl"])
        c.load_unet(torch.float16), c.load_text_encoder("text_encoder"), c.load_scheduler()
        with pytest.raises(RuntimeError), quiet():
            torch.set_default_dtype(torch.float16)  # as diffusers does, and leaves it so when it fails
            raise RuntimeError
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert (torch.get_default_dtype(), diffusers.logging.get_verbosity()) == before[1:]
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_the_scheduler_is_ddim_whatever_the_base_model_used(copy: Callable[..., Path]) -> None:
    folder = copy()
    sdxl = {  # the scheduler_config.json of SDXL 1.0
        "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
    }  # fmt: skip
    ours = Checkpoint.open(folder).load_scheduler()
    put(folder / "scheduler" / "scheduler_config.json", json.dumps(sdxl))
    theirs = Checkpoint.open(folder).load_scheduler()
    assert isinstance(theirs, diffusers.DDIMScheduler)
    theirs.set_timesteps(30)
    assert theirs.timesteps.tolist()[:2] == [958, 925] and theirs.timesteps.tolist()[-2:] == [34, 1]
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert theirs.final_alpha_cumprod == ours.alphas_cumprod[0]


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_network_that_predicts_clean_latents_is_taken(zero_snr: bool, copy: Callable[..., Path]) -> None:
    """As the 1-step SDXL-Lightning does, with Euler's steps."""
    folder = copy()
    edit(
        folder / "scheduler" / "scheduler_config.json", prediction_type="sample", rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
    )  # fmt: skip
    edit(folder / "realisid_config.json", sampler={"name": "euler", "spacing": "trailing"}, num_inference_steps=1)
    c = Checkpoint.open(folder)
    assert c.noise_schedule.prediction_type == "sample" and c.noise_schedule.begins_in_noise == zero_snr
    [[latents, _, _, clean]] = table_of(c.config.sampler, c.noise_schedule, 1).matrix
    np.testing.assert_array_equal(latents, [0, 1, 0, 0, 0])  # the picture is what the network says
    np.testing.assert_array_equal(clean, latents)


def test_the_noise_schedule_is_the_engine_s(copy: Callable[..., Path]) -> None:
    schedule = Checkpoint.open(copy()).noise_schedule
    assert (schedule.timestep_spacing, schedule.steps_offset, schedule.prediction_type) == ("leading", 1, "epsilon")
    assert schedule.alphas_cumprod.dtype == np.float64 and schedule.alphas_cumprod.shape == (1000,)
    assert schedule.final_alpha_cumprod == schedule.alphas_cumprod[0] > schedule.alphas_cumprod[1]
