"""What comes out: the published numbers to the bit, the rows, the schedule, the base model."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.adopt.__main__ import main
from export.checkpoint import Checkpoint
from export.checkpoint.files import read_weights
from export.miniature.presets import scheduler_config
from tests.export.adopt.published import SCHEDULERS, STEM, as_hub_cache, card, random_net, save, write
from tests.export.checkpoint.bad_checkpoints import edit

XINSIR = "openpose=openpose,style=openpose-xinsir"
WEIGHTS = f"{STEM}.safetensors"


def adopt(line: str) -> Path:
    assert main(line.split()) == 0
    return Path(line.split()[line.split().index("--out") + 1])


def opened(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(folder, local_files_only=True)
    checkpoint.check_weights()
    return checkpoint


def weights(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    return read_weights(checkpoint.components[f"controlnet_{name}"].files)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """To the bit, types included."""
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """Contents and times of every file."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_published_nets_become_a_checkpoint(here: Path, capsys: Any) -> None:
    before = digests(here)
    out = adopt(f"controlnet --net {XINSIR},scale=0.7 --net canny=canny,start=0.1,end=0.6 --base SDXL --out OUT")
    assert digests(here).items() >= before.items()  # the sources are as they were
    checkpoint = opened(out)
    assert checkpoint.config.method == "controlnet" and checkpoint.config.id_input == "none"
    assert checkpoint.config.force_zeros_for_empty_prompt  # as SDXL's model_index.json has it
    openpose, canny = checkpoint.config.table
    assert (openpose.name, openpose.style, openpose.scale) == ("openpose", "openpose-xinsir", 0.7)
    assert (canny.name, canny.style, canny.start, canny.end) == ("canny", None, 0.1, 0.6)
    for row in (openpose, canny):
        assert (row.view, row.writes, row.per, row.tokens) == ("picture", "everywhere", "picture", "text")
        assert (row.condition, row.channels, row.pooled, row.optional) == ("image", 3, "per_row", True)
    for name in ("openpose", "canny"):
        assert equal(weights(checkpoint, name), load_file(here / name / WEIGHTS))
        linked = (out / f"controlnet_{name}" / WEIGHTS).stat().st_ino
        assert linked == (here / name / WEIGHTS).stat().st_ino
        checkpoint.load_controlnet(name)
    assert checkpoint.base == here / "SDXL"
    assert json.loads((out / "model_index.json").read_text())["base_model"] == "../SDXL"
    assert {path.name for path in out.iterdir()} == {
        "controlnet_openpose", "controlnet_canny", "scheduler", "model_index.json", "realisid_config.json",
    }  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "openpose: 2.0 MB of openpose linked"
    assert "licence of controlnet_openpose (openpose): apache-2.0" in said
    assert "licence of controlnet_canny (canny): openrail++" in said
    assert "licence of base_model (SDXL): CreativeML Open RAIL++-M (LICENSE.md)" in said
    assert "its engine will take about" in said[-2] and "MB of the GPU's memory for the weights" in said[-2]
    build = f"python -m export.build --checkpoint {out.absolute()} --fp16"
    assert said[-1] == f"{out.absolute()}: branches openpose, canny. Build it: {build}"


def test_the_schedule_is_the_base_model_s_with_the_last_step_at_one(here: Path) -> None:
    adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT")
    found = json.loads((here / "OUT" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler_config("epsilon", "controlnet").items() <= found.items()
    assert found["_class_name"] == "DDIMScheduler" and found["set_alpha_to_one"] and not found["clip_sample"]
    # What the file does not say has the default of the base's own class, not DDIM's.
    scheduler = here / "SDXL" / "scheduler" / "scheduler_config.json"
    edit(scheduler, timestep_spacing=..., steps_offset=..., clip_sample=..., prediction_type="v_prediction")
    adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT")
    config = opened(here / "OUT").scheduler_config
    assert (config["timestep_spacing"], config["steps_offset"]) == ("linspace", 0)  # Euler's
    assert config["prediction_type"] == "v_prediction" and config["clip_sample"] is False
    write(scheduler, {**SCHEDULERS["sdxl"], "_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True,
                      "prediction_type": "v_prediction", "timestep_spacing": "trailing"})  # fmt: skip
    adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT")
    config = opened(here / "OUT").scheduler_config
    assert config["rescale_betas_zero_snr"] and config["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("base", ["SDXL", "CKPT"])
def test_a_row_is_added_to_any_checkpoint(base: str, here: Path) -> None:
    if base == "SDXL":
        adopt("controlnet --net canny=canny --base SDXL --out first")
    first = here / ("first" if base == "SDXL" else "CKPT")
    before = digests(first)
    given = opened(first)
    (here / "below").mkdir()
    out = adopt(f"add --checkpoint {first.name} --net {XINSIR},end=0.5 --out below/OUT")
    assert digests(first) == before
    checkpoint = opened(out)
    assert checkpoint.config.table[:-1] == given.config.table
    assert (checkpoint.config.table[-1].name, checkpoint.config.table[-1].end) == ("openpose", 0.5)
    values = json.loads((out / "realisid_config.json").read_text())
    assert "branch_pooled_text" not in values and len(values["branches"]) == len(checkpoint.config.table)
    assert checkpoint.scheduler_config == given.scheduler_config
    assert checkpoint.base == here / "SDXL"  # another folder's "../SDXL" is written anew
    for name, component in given.components.items():
        ours = checkpoint.components[name]
        assert ours.config == component.config
        assert [f.stat().st_ino for f in ours.files] == [f.stat().st_ino for f in component.files]
    assert equal(weights(checkpoint, "openpose"), load_file(here / "openpose" / WEIGHTS))
    parts = [line["part"] for line in json.loads((out / "model_index.json").read_text())["licences"]]
    first_parts = ["controlnet_canny" if base == "SDXL" else "checkpoint", "base_model"]
    assert parts == [*first_parts, "controlnet_openpose"]


def test_a_net_that_draws_faces(here: Path, capsys: Any) -> None:
    out = adopt("mediapipe-face --weights face --base SD15 --variant fp16 --out OUT")
    checkpoint = opened(out)  # without a variant: the files have plain names
    [row] = checkpoint.config.table
    assert (row.name, row.condition, row.style, row.per) == ("face", "pose", "mediapipe-face", "picture")
    assert (row.tokens, row.pooled, row.writes) == ("text", "zeros", "everywhere")
    assert not checkpoint.config.force_zeros_for_empty_prompt
    assert checkpoint.scheduler_config["timestep_spacing"] == "leading"  # PNDM's
    source = here / "face" / "diffusion_sd15" / f"{STEM}.fp16.safetensors"
    assert equal(weights(checkpoint, "face"), load_file(source))
    assert "licence of controlnet_face (face): openrail, mit" in capsys.readouterr().out
    again = adopt("mediapipe-face --weights face/diffusion_sd15 --base SD15 --variant fp16 --out SECOND")
    assert opened(again).config == checkpoint.config


def test_a_pickle_is_converted_to_the_bit(here: Path, capsys: Any) -> None:
    (here / "canny" / WEIGHTS).unlink()
    (here / "canny" / f"{STEM}.fp16.safetensors").unlink()
    for variant, dtype in (("", torch.float32), (" --variant fp16", torch.float16)):
        checkpoint = opened(adopt(f"controlnet --net canny=canny{variant} --base SDXL --out OUT"))
        assert "canny converted" in capsys.readouterr().out
        original = torch.load(here / "canny" / f"{STEM}{variant and '.fp16'}.bin", weights_only=True)
        assert {tensor.dtype for tensor in original.values()} == {dtype}
        assert equal(weights(checkpoint, "canny"), original)


def test_half_precision(here: Path) -> None:
    whole = load_file(here / "canny" / WEIGHTS)
    checkpoint = opened(adopt("controlnet --net canny=canny --base SDXL --out OUT --half"))
    assert equal(weights(checkpoint, "canny"), {key: tensor.half() for key, tensor in whole.items()})
    linked = adopt(f"controlnet --net {XINSIR} --base SDXL --out OTHER --half")  # it is in half precision already
    assert (linked / "controlnet_openpose" / WEIGHTS).stat().st_ino == (here / "openpose" / WEIGHTS).stat().st_ino


def test_half_precision_goes_shard_by_shard(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.adopt import weights as module

    written = module.write_weights
    monkeypatch.setattr(module, "write_weights", lambda *given: written(*given, shard_bytes=500_000))
    checkpoint = opened(adopt("controlnet --net canny=canny --base SDXL --out OUT --half"))
    assert len(checkpoint.components["controlnet_canny"].files) == 4
    whole = load_file(here / "canny" / WEIGHTS)
    assert equal(weights(checkpoint, "canny"), {key: tensor.half() for key, tensor in whole.items()})


def test_a_copy_shares_nothing(here: Path) -> None:
    out = adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT --copy")
    ours, theirs = out / "controlnet_openpose" / WEIGHTS, here / "openpose" / WEIGHTS
    assert ours.stat().st_ino != theirs.stat().st_ino and ours.read_bytes() == theirs.read_bytes()
    more = adopt("add --checkpoint OUT --net canny=canny --out MORE --copy")
    assert (more / "controlnet_openpose" / WEIGHTS).stat().st_ino != ours.stat().st_ino


def test_where_no_link_can_be_made_a_copy_is(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Another disk, or the file of another user."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT")
    assert (out / "controlnet_openpose" / WEIGHTS).read_bytes() == (here / "openpose" / WEIGHTS).read_bytes()
    assert "openpose copied" in capsys.readouterr().out


def test_a_net_without_attention_and_one_of_grey_pictures(here: Path) -> None:
    save(random_net("sdxl", 7, conditioning_channels=1), here / "grey")
    checkpoint = opened(adopt("controlnet --net small=small --net grey=grey --base SDXL --out OUT"))
    assert [row.channels for row in checkpoint.config.table] == [3, 1]
    assert not any("attn" in key for key in weights(checkpoint, "small"))


def test_shards_keep_their_numbers(here: Path) -> None:
    net = random_net("sdxl", 8)
    save(net, here / "parts", max_shard_size="1MB")
    assert len(list((here / "parts").glob("*.safetensors"))) > 2
    checkpoint = opened(adopt("controlnet --net parts=parts --base SDXL --out OUT"))
    assert equal(weights(checkpoint, "parts"), net.state_dict())
    checkpoint.load_controlnet("parts")
    save(net, here / "variant", max_shard_size="1MB", variant="fp16")
    checkpoint = opened(adopt("controlnet --net parts=variant --base SDXL --variant fp16 --out OUT"))
    assert equal(weights(checkpoint, "parts"), net.state_dict())


def test_a_hub_cache_is_made_of_links(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    net = as_hub_cache(here / "openpose", cache, "xinsir/controlnet-openpose-sdxl-1.0")
    as_hub_cache(here / "SDXL", cache, "stabilityai/stable-diffusion-xl-base-1.0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    out = adopt(f"controlnet --net openpose={net} --base {base} --out OUT")
    file = out / "controlnet_openpose" / WEIGHTS
    assert file.is_file() and not file.is_symlink()
    assert file.stat().st_ino == (here / "openpose" / WEIGHTS).stat().st_ino
    assert json.loads((out / "model_index.json").read_text())["base_model"] == base
    said = capsys.readouterr().out
    assert "licence of controlnet_openpose (xinsir/controlnet-openpose-sdxl-1.0): apache-2.0" in said
    assert f"licence of base_model ({base}): CreativeML" in said
    linked = here / "link"
    linked.symlink_to(net)
    more = adopt("add --checkpoint OUT --net second=link --out MORE")
    assert json.loads((more / "model_index.json").read_text())["base_model"] == base
    assert all(not path.is_symlink() for path in more.rglob("*"))


def test_our_own_folder_is_replaced_and_json_is_the_last_line(here: Path, capsys: Any) -> None:
    adopt("controlnet --net canny=canny --base SDXL --out OUT")
    card(here / "openpose", "license: other\nlicense_name: my-licence\x1b[31m")
    capsys.readouterr()
    adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT --json")
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["branches"] == ["openpose"] and values["path"] == str(here / "OUT")
    assert values["licences"][0] == {"part": "controlnet_openpose", "licence": "my-licence[31m", "source": "openpose"}
    assert values["engine_bytes"] > values["loop_bytes"] > 2 * 2**20
    assert not (here / "OUT" / "controlnet_canny").exists()
    assert [name for name in os.listdir(here) if name.startswith(".")] == []


def test_what_the_engine_will_weigh(here: Path, capsys: Any) -> None:
    """Two bytes a number, four in the VAE's decoder: the rest of the engine is small."""
    adopt(f"controlnet --net {XINSIR} --base SDXL --out OUT --json")
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    checkpoint = opened(here / "OUT")
    count = {name: sum(checkpoint.elements(name).values()) for name in checkpoint.components}
    decoder = sum(n for key, n in checkpoint.elements("vae").items() if key.startswith(("decoder.", "post_quant")))
    texts = sum(count[name] for name in checkpoint.text_encoder_names)
    assert values["engine_bytes"] == 2 * (count["unet"] + count["controlnet_openpose"] + texts) + 4 * decoder
    condition_and_time = sum(
        n for name in ("unet", "controlnet_openpose") for key, n in checkpoint.elements(name).items()
        if key.startswith(("time_embedding.", "add_embedding.", "controlnet_cond_embedding."))
    )  # fmt: skip
    assert values["loop_bytes"] == 2 * (count["unet"] + count["controlnet_openpose"] - condition_and_time)
