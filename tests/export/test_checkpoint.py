"""Claims about opening checkpoints: every family opens, every contradiction is named, weights arrive unchanged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint
from export.checkpoint_base import _wanted
from export.checkpoint_classes import quiet
from export.id_projection import LinearProjection, Resampler
from export.miniature import make_checkpoint
from realisid_trt.errors import CheckpointError
from tests.export.bad_checkpoints import BAD, UNET, edit, put


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that no test changes: SDXL's shape, SD 1.5's, and one with a resampler and a null ID of its own."""
    folder = tmp_path_factory.mktemp("made")
    varieties: dict[str, dict[str, Any]] = {
        "sdxl": {}, "sd15": {"family": "sd15", "vae_factor": 8}, "file": {"null_id": "file", "id_tokens": 7},
    }  # fmt: skip
    return {name: make_checkpoint(folder / name, **options) for name, options in varieties.items()}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a made checkpoint, of hard links: change files with `edit`, `put` and `unlink`, never in place."""

    def copy(name: str = "sdxl", to: str = "checkpoint") -> Path:
        return Path(shutil.copytree(made[name], tmp_path / to, copy_function=os.link))

    return copy


def weights(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], object], name: str = UNET) -> None:
    file = folder / part / name
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


# --- what opens


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


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
@torch.no_grad()
def test_the_residuals_are_those_that_diffusers_makes(made: dict[str, Path], name: str) -> None:
    c = Checkpoint.open(made[name])
    side, pixels = c.sample_size, c.sample_size * c.vae_scale_factor
    added = {"text_embeds": torch.zeros(1, c.pooled_dim), "time_ids": torch.zeros(1, 6)}
    for which, channels in (("local", 3), ("global", 1)):
        skips, middle = c.load_controlnet(which)(
            torch.zeros(1, c.latent_channels, side, side), 1, torch.zeros(1, c.num_id_tokens, c.cross_attention_dim),
            torch.zeros(1, channels, pixels, pixels), added_cond_kwargs=added, return_dict=False,
        )  # fmt: skip
        expected = tuple((channels, side >> level, side >> level) for channels, level in c.residuals)
        assert tuple(tuple(r.shape[1:]) for r in [*skips, middle]) == expected


def test_sdxls_residuals_are_the_ten_of_the_paper() -> None:
    from export.checkpoint_checks import residual_shapes

    shapes = residual_shapes({"block_out_channels": (320, 640, 1280), "layers_per_block": 2})
    assert shapes == ((320, 0),) * 3 + ((320, 1),) + ((640, 1),) * 2 + ((640, 2),) + ((1280, 2),) * 3
    assert len(residual_shapes({"block_out_channels": (8, 16), "layers_per_block": [1, 3]})) == 1 + 1 + 1 + 3 + 1


def test_modules_come_in_evaluation_mode_without_gradients_in_the_asked_type(made: dict[str, Path]) -> None:
    c = Checkpoint.open(made["sdxl"])
    c.check_weights()
    modules = {
        "unet": c.load_unet(torch.float16), "vae": c.load_vae(torch.float16),
        "image_encoder": c.load_image_encoder(torch.float16), "id_projection": c.load_id_projection(torch.float16),
        "controlnet_local": c.load_controlnet("local", torch.float16),
        "controlnet_global": c.load_controlnet("global", torch.float16),
        **{name: c.load_text_encoder(name, torch.float16) for name in c.text_encoder_names},
    }  # fmt: skip
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


# --- ID projection and null ID


def test_the_linear_projection_is_the_layer_norm_of_an_affine_map() -> None:
    module = LinearProjection(6, 4).double()
    features = torch.randn(2, 5, 6, dtype=torch.float64)
    affine = torch.einsum("bni,oi->bno", features, module.proj.weight) + module.proj.bias
    spread = affine.var(-1, unbiased=False, keepdim=True)
    expected = (affine - affine.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt()
    assert torch.allclose(module(features), expected * module.norm.weight + module.norm.bias, rtol=0, atol=1e-12)


def test_the_resampler_is_ip_adapter_plus() -> None:
    """Its keys are the published ones, and diffusers' own module gives the same tokens with the same weights."""
    ours = Resampler(12, 2, 5, 3, 7, 9, 8, 2).double().eval()
    renamed = {}
    for key, value in ours.state_dict().items():
        for old, new in (
            ("0.norm1", "ln0"), ("0.norm2", "ln1"), ("0.to_q", "attn.to_q"), ("0.to_out", "attn.to_out.0"),
            ("1.0", "ff.0"), ("1.1", "ff.1.net.0.proj"), ("1.3", "ff.1.net.2"),
        ):  # fmt: skip
            parts = key.split(".", 2)
            if parts[0] == "layers" and parts[2].startswith(old + "."):
                key = f"layers.{parts[1]}.{new}{parts[2].removeprefix(old)}"
        if key.endswith("0.to_kv.weight"):
            layer = key.split(".")[1]
            renamed[f"layers.{layer}.attn.to_k.weight"], renamed[f"layers.{layer}.attn.to_v.weight"] = value.chunk(2)
        else:
            renamed[key] = value
    theirs = IPAdapterPlusImageProjection(9, 8, 12, 2, 5, 3, 7, 2).double().eval()
    theirs.load_state_dict(renamed)
    features = torch.randn(2, 11, 9, dtype=torch.float64)
    assert ours(features).shape == (2, 7, 8)
    assert torch.allclose(ours(features), theirs(features), rtol=0, atol=1e-12)
    published = {"latents", "proj_in.weight", "proj_out.bias", "norm_out.weight", "layers.0.0.norm1.weight",
                 "layers.0.0.to_q.weight", "layers.1.0.to_kv.weight", "layers.0.0.to_out.weight",
                 "layers.1.1.0.bias", "layers.1.1.1.weight", "layers.1.1.3.weight"}  # fmt: skip
    assert published <= set(ours.state_dict())


@torch.no_grad()
def test_the_null_id_is_what_the_config_says(copy: Callable[..., Path], made: dict[str, Path]) -> None:
    folder = copy()
    c = Checkpoint.open(folder)
    black = torch.zeros(1, 3, 64, 64)
    features = c.load_image_encoder()(black, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(c.null_id_tokens(), c.load_id_projection()(features)[0])
    edit(folder / "realisid_config.json", null_id="zero_tokens")
    assert torch.equal(Checkpoint.open(folder).null_id_tokens(), torch.zeros(65, 64))
    kept = load_file(made["file"] / "null_id.safetensors")["null_id_tokens"]
    assert torch.equal(Checkpoint.open(made["file"]).null_id_tokens(), kept) and kept.shape == (7, 64)


# --- variants, shards, base models


def same_weights(one: Path, other: Path, part: str = "unet", variant: str | None = None) -> bool:
    a, b = (Checkpoint.open(path, variant=variant)._load(part, torch.float16).state_dict() for path in (one, other))
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
    Checkpoint.open(folder)  # beside safetensors a pickle is not read, and harms nobody
    (folder / "unet" / UNET).unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert "Pickles are refused" in str(caught.value) and "if you trust its source" in str(caught.value)
    command = str(caught.value).split("if you trust its source: ")[1]
    subprocess.run(["bash", "-c", command], check=True)
    assert same_weights(made["sdxl"], folder)


# --- weights that do not fit


BAD_WEIGHTS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], tuple[str, ...]]] = {
    "missing": ("unet", lambda w: w.pop("conv_in.bias"), ("1 missing (conv_in.bias)", "UNet2DConditionModel")),
    "surplus": ("vae", lambda w: w.update(extra=torch.zeros(2)), ("1 unexpected (extra)", "AutoencoderKL")),
    "shape": (
        "controlnet_global",
        lambda w: w.update({"conv_in.bias": torch.zeros(3)}),
        ("1 of another shape (conv_in.bias: (3,) in the file, (16,) expected)",),
    ),
    "many": (
        "controlnet_local",
        lambda w: [w.pop(key) for key in list(w) if key.startswith("mid_block.")],
        ("missing (mid_block.attentions.0.norm.bias, ", ", …)"),
    ),
    "text": (
        "text_encoder_2",
        lambda w: w.update(renamed=w.pop("text_projection.weight")),
        ("1 missing (text_projection.weight)", "1 unexpected (renamed)"),
    ),
    "projection": (
        "id_projection",
        lambda w: w.update({"norm.gamma": w.pop("norm.weight")}),
        ("1 missing (norm.weight)", "1 unexpected (norm.gamma)"),
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_must_have_exactly_the_keys_of_their_config(name: str, copy: Callable[..., Path]) -> None:
    part, change, pieces = BAD_WEIGHTS[name]
    folder = copy()
    weights(folder, part, change, next((folder / part).glob("*.safetensors")).name)
    c = Checkpoint.open(folder)
    loads = {"id_projection": c.load_id_projection}.get(part, lambda: c._load(part, torch.float32))
    for check in (c.check_weights, loads):  # from the headers, and again by the library that loads
        with pytest.raises(CheckpointError) as caught:
            check()
        for piece in (str(folder / part), *pieces, "Copy config.json and weights from the same place"):
            assert piece in str(caught.value)


def test_position_ids_of_old_clip_files_are_no_surplus(copy: Callable[..., Path]) -> None:
    folder = copy()
    key = "text_model.embeddings.position_ids"
    weights(folder, "text_encoder", lambda w: w.update({key: torch.arange(77)[None]}), "model.safetensors")
    c = Checkpoint.open(folder)
    c.check_weights()
    c.load_text_encoder("text_encoder")


# --- every other way to be wrong


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


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist, expected a checkpoint's folder.*export.miniature"):
        Checkpoint.open(tmp_path / "nothing")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(CheckpointError, match="model.ckpt is a file, expected a checkpoint's folder"):
        Checkpoint.open(tmp_path / "model.ckpt")


# --- keys of the engine's cache


def test_weights_keys_follow_the_contents_and_nothing_else(copy: Callable[..., Path], made: dict[str, Path]) -> None:
    folder = copy()
    names = ("unet", "vae", "id_projection", "null_id", "scheduler", "tokenizer")
    before = {name: Checkpoint.open(made["sdxl"]).weights_key(name) for name in names}
    edit(folder / "unet" / "config.json", _diffusers_version="0.0.1", _name_or_path="elsewhere")
    c = Checkpoint.open(folder)
    assert {name: c.weights_key(name) for name in names} == before
    assert len(set(before.values())) == len(names) and all(len(key) == 64 for key in before.values())

    def changed() -> set[str]:
        checkpoint = Checkpoint.open(folder)
        return {name for name in names if checkpoint.weights_key(name) != before[name]}

    weights(folder, "unet", lambda w: w["conv_in.bias"].add_(1))
    assert changed() == {"unet"}
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    assert changed() == {"unet", "vae"}
    weights(folder, "id_projection", lambda w: w["proj.bias"].add_(1), "model.safetensors")
    assert changed() == {"unet", "vae", "id_projection", "null_id"}
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0)
    put(folder / "tokenizer" / "merges.txt", "#version: 0.2\n")
    assert changed() == set(names)
