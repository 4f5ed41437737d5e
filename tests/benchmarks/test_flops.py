"""Operations that were really asked for, against diffusers' own forward and the design's arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import baseline_parts, count_networks, flops_per_row, shapes_only, tokens_of, total_flops
from export.checkpoint import Checkpoint
from export.checkpoint.checks import check_all
from export.checkpoint.classes import full_config, meta_module
from export.checkpoint.face_encoder import FaceEncoder
from export.miniature import modules_of, recipe_of
from export.miniature.presets import preprocessor_config
from export.networks import networks
from export.truth.flops import flops_per_row as count
from realisid_trt.branches import Branch
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from realisid_trt.loop.rows import PictureRows, guidance_weights, plan_rows, steps_without_id
from realisid_trt.manifest import Manifest
from tests.benchmarks.support import STEPS


def test_operations_are_the_design_s_arithmetic(measured: dict[str, Any], engine_dir: Path) -> None:
    per_row = {name: network["flops_per_row"] for name, network in Manifest.read(engine_dir).values["networks"].items()}
    encoder, decoder = per_row["unet_encoder"], per_row["unet_decoder"]
    branches = per_row["local_branch"] + per_row["global_branch"]
    unet = encoder + decoder + per_row["unet_time"]
    both = branches + sum(
        per_row[f"{branch}_{part}"] for branch in ("local", "global") for part in ("condition", "time")
    )
    once = sum(per_row[name] for name in measured["cases"][0]["contenders"]["naive"]["rows"] if "text_encoder" in name)
    once += per_row["vae_decoder"]
    times = 2 * STEPS * per_row["unet_time"] + STEPS * (per_row["local_time"] + per_row["global_time"])
    for case in measured["cases"]:
        n, contenders = case["persons"], case["contenders"]
        conditions = n * (per_row["local_condition"] + per_row["global_condition"])
        ours = {
            "without_id": 2 * encoder + 2 * decoder + n * branches,
            "with_id": 2 * encoder + 3 * decoder + 2 * n * branches,
        }
        two, three = (rows * (unet + n * both) for rows in (2, 3))
        for name, without_id, with_id, before in (
            ("engine", ours["without_id"], ours["with_id"], times + conditions),
            ("naive", two, three, 0),
            ("naive-shared", two - n * both, three - n * both, 0),
            ("naive-no-delay", three, three, 0),
            ("naive-compiled", two, three, 0),
        ):
            found = {phase: tflop * 1e12 for phase, tflop in contenders[name]["step_tflop"].items()}
            assert found == pytest.approx({"without_id": without_id, "with_id": with_id}, rel=1e-12)
            assert contenders[name]["tflop"] * 1e12 == pytest.approx(once + before + without_id + with_id, rel=1e-12)
        tflop = {name: contender["tflop"] for name, contender in contenders.items()}
        assert tflop["engine"] < tflop["naive-shared"] < tflop["naive"] < tflop["naive-no-delay"]
        for name, ratio in case["ratios"].items():
            assert ratio["flop"] == pytest.approx(tflop[name] / tflop["engine"])


def test_a_network_that_nobody_counted_is_no_free_one() -> None:
    assert total_flops({"unet": 3, "crop": 5, "guide_step": 1}, {"unet": 7}) == 21
    with pytest.raises(KeyError, match="refiner"):
        total_flops({"unet": 3, "refiner": 1}, {"unet": 7})


def test_a_naive_row_is_a_forward_of_diffusers(engine_dir: Path, checkpoint_dir: Path) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir)
    per_row = flops_per_row(Manifest.read(engine_dir), 128, 128, None)
    side = checkpoint.sample_size
    with torch.device("meta"), torch.no_grad():
        latents = torch.zeros(3, checkpoint.latent_channels, side, side)
        added = {"text_embeds": torch.zeros(3, checkpoint.pooled_dim), "time_ids": torch.zeros(3, 6)}
        text = torch.zeros(3, 77, checkpoint.cross_attention_dim)
        tokens = torch.zeros(3, checkpoint.num_id_tokens, checkpoint.cross_attention_dim)
        calls = {
            "unet": {"encoder_hidden_states": text},
            "controlnet_local": {"encoder_hidden_states": tokens, "controlnet_cond": torch.zeros(3, 3, 128, 128)},
            "controlnet_global": {"encoder_hidden_states": tokens, "controlnet_cond": torch.zeros(3, 1, 128, 128)},
        }
        for name, inputs in calls.items():
            module = meta_module(checkpoint.components[name]).eval()
            with FlopCounterMode(display=False) as counter:
                module(latents, torch.tensor(1), added_cond_kwargs=added, **inputs)
            # The module embeds its one timestep once for all rows; a row's share of that is counted per row.
            assert counter.get_total_flops() == pytest.approx(3 * per_row[name], rel=1e-3)


def test_another_picture_size_is_counted_anew(engine_dir: Path, checkpoint_dir: Path) -> None:
    manifest, checkpoint = Manifest.read(engine_dir), Checkpoint.open(checkpoint_dir)
    listed = {name: network["flops_per_row"] for name, network in manifest.values["networks"].items()}
    counted = count_networks(checkpoint, 128, 128)
    assert set(counted) == {"unet_encoder", "unet_decoder", "global_condition", "global_branch", "vae_decoder"}
    assert counted == {name: listed[name] for name in counted}
    larger = flops_per_row(manifest, 128, 192, checkpoint)
    assert larger["local_branch"] == listed["local_branch"]  # its canvas does not grow with the picture
    assert larger["global_condition"] == 1.5 * listed["global_condition"]  # convolutions only
    assert larger["unet_encoder"] > 1.5 * listed["unet_encoder"]  # attention grows faster
    with pytest.raises(RequestError, match=r"a 192×128 px picture .* Give --checkpoint too"):
        flops_per_row(manifest, 128, 192, None)


def full_size(face_encoder: FaceEncoder | None = None, **options: Any) -> Checkpoint:
    """A checkpoint of SDXL's configs: no weights."""
    recipe = recipe_of(preset="sdxl", **options)
    components = {name: component for name, (component, _) in modules_of(recipe, Path("sdxl")).items()}
    texts = ("text_encoder", "text_encoder_2")
    configs = {name: full_config(component) for name, component in components.items()}
    if face_encoder is None:
        configs["feature_extractor"] = preprocessor_config(224)
    facts = check_all(configs, recipe.realisid, texts, face_encoder)
    given: Any = {"path": Path("sdxl"), "folders": {}, "scheduler_config": {}, "text_encoder_names": texts, **facts}
    return Checkpoint(components=components, face_encoder=face_encoder, **given)


@pytest.fixture(scope="module")
def sdxl() -> dict[str, float]:
    """Network → TFLOP of a row at 1024², counted from SDXL's configs: no weights. `small`: a ControlNet of the kind
    that is published as "-small", which has no attention."""
    checkpoint = full_size(method="mixed", branch_pooled_text="zeros")
    components = checkpoint.components
    wanted = ("unet_encoder", "unet_decoder", "local_branch", "global_branch", "openpose_branch", "openpose_condition")

    def counted(of: Checkpoint, names: tuple[str, ...]) -> dict[str, float]:
        found = networks(shapes_only(of))
        units = {"height": 32, "width": 32}
        return {name: count(found[name], found[name].module(torch.float32), units) / 1e12 for name in names}

    openpose = components["controlnet_openpose"]
    blocks = {"down_block_types": ["DownBlock2D"] * 3, "transformer_layers_per_block": 0}
    small = dataclasses.replace(openpose, config={**openpose.config, **blocks})
    with_small = dataclasses.replace(checkpoint, components={**components, "controlnet_openpose": small})
    numbers = sum(weight.numel() for weight in meta_module(small).parameters())
    assert numbers / 1e6 == pytest.approx(160.1, abs=0.05)
    return counted(checkpoint, wanted) | {"small": counted(with_small, ("openpose_branch",))["openpose_branch"]}


@pytest.mark.slow("rows of sdxl")
def test_a_row_of_sdxl(sdxl: dict[str, float]) -> None:
    """77 tokens of text, 257 of the ID."""
    expected = {
        "unet_encoder": 2.933, "unet_decoder": 3.828, "local_branch": 3.058, "global_branch": 3.058,
        "openpose_branch": 2.961, "openpose_condition": 0.059, "small": 0.507,
    }  # fmt: skip
    assert {name: round(tflop, 3) for name, tflop in sdxl.items()} == expected


@pytest.mark.slow("rows of sdxl")
@pytest.mark.parametrize(
    ("branches", "persons", "rows", "tflop"),
    [
        (("local", "global"), 1, (2, 3, 2, 2), "29.6"),
        (("local", "global"), 2, (2, 3, 4, 4), "41.8"),
        (("local", "global", "openpose"), 1, (2, 3, 2, 2, 2), "35.5"),
        (("local", "global", "openpose"), 2, (2, 3, 4, 4, 2), "47.7"),
        (("local", "global", "small"), 1, (2, 3, 2, 2, 2), "30.6"),
        (("openpose",), 0, (2, 2, 2), "19.4"),
        (("openpose", "depth"), 0, (2, 2, 2, 2), "25.4"),
    ],
)
def test_rows_and_operations_of_a_step(
    sdxl: dict[str, float], branches: tuple[str, ...], persons: int, rows: tuple[int, ...], tflop: str
) -> None:
    """With the ID: every branch in its window. A depth ControlNet has the shape of the openpose one."""
    table = [*RealisIDConfig(branch_pooled_text="zeros").table] if "local" in branches else []
    for name in branches[len(table) :]:
        row = {"name": name, "condition": "image", "tokens": "text", "pooled": "per_row"}
        table.append(Branch.from_dict(row, "realisid-v1", "a test"))
    weights = guidance_weights(7.5, 5.0, persons > 0)
    plan = plan_rows([PictureRows((0, 1), tuple(range(persons)), weights, (True,) * len(table))], table)
    assert (len(plan.encoder), len(plan.decoder), *(len(of.rows) for of in plan.branches)) == rows
    per_row = {f"{name}_branch": tflop for name, tflop in sdxl.items()} | sdxl
    per_row["depth_branch"] = sdxl["openpose_branch"]
    names = ("unet_encoder", "unet_decoder", *(f"{branch.name}_branch" for branch in table))
    assert f"{sum(count * per_row[name] for name, count in zip(names, rows, strict=True)):.1f}" == tflop


@pytest.fixture(scope="module")
def id_patch() -> dict[int, dict[str, float]]:
    """Persons → network → TFLOP of a row of ID-Patch at 1024² with their ID tokens; 0: with the text alone."""
    encoder = FaceEncoder(sha256="0" * 64, colour="bgr", norm="unit", points="mtcnn-whole", name="x", licence=None)
    checkpoint = full_size(encoder, method="idpatch")
    tokenizers = {"tokenizer": SimpleNamespace(max_length=77)}
    model = SimpleNamespace(num_id_tokens=checkpoint.num_id_tokens, tokenizers=tokenizers)
    manifest: Any = SimpleNamespace(model=model, config=checkpoint.config)
    found = {}
    for persons in (0, 1, 2, 3, 4, 6, 8):
        tokens = tokens_of(manifest, persons, with_id=True)
        assert (tokens, tokens_of(manifest, persons, with_id=False)) == (77 + 16 * persons, 77)
        counts = count_networks(checkpoint, 1024, 1024, tokens)
        found[persons] = {name: count / 1e12 for name, count in counts.items()}
    return found


@pytest.mark.slow("rows of sdxl")
def test_a_step_of_id_patch(id_patch: dict[int, dict[str, float]]) -> None:
    """19.45 TFLOP before the switch, for any number of persons; afterwards a little more for each of them."""
    table = RealisIDConfig.from_dict({"method": "idpatch"}).table
    step = dict[tuple[int, bool], float]()
    for persons in (1, 2, 3, 4, 6, 8):
        for with_id in (False, True):
            weights = guidance_weights(5.5, None, with_id)
            picture = PictureRows((0, 1), tuple(range(persons)), weights, (True,), absent=not with_id)
            plan = plan_rows([picture], table, "text_and_id")
            rows = {
                "unet_encoder": len(plan.encoder), "unet_decoder": len(plan.decoder),
                "id_patch_branch": len(plan.branches[0].rows),
            }  # fmt: skip
            assert set(rows.values()) == {2}
            per_row = id_patch[persons if with_id else 0]
            step[persons, with_id] = sum(count * per_row[name] for name, count in rows.items())
    assert {f"{step[persons, False]:.2f}" for persons in (1, 2, 3, 4, 6, 8)} == {"19.45"}
    assert [f"{step[persons, True]:.2f}" for persons in (1, 2, 3, 4, 6, 8)] == [
        "19.50", "19.55", "19.60", "19.65", "19.76", "19.86",
    ]  # fmt: skip
    # The published pipeline embeds the condition in every step.
    published = step[1, False] + 2 * id_patch[0]["id_patch_condition"]
    assert f"{published:.2f}" == "19.56"
    for steps, delayed, tflop in ((50, 10, 976), (30, 6, 586)):
        assert steps_without_id(steps, 0.8, "exclusive") == delayed
        assert round(delayed * step[2, False] + (steps - delayed) * step[2, True]) == tflop


def test_the_parts_of_the_baselines_are_the_table() -> None:
    table = RealisIDConfig(branch_pooled_text="zeros").table
    assert baseline_parts(table) == {
        "unet": ("unet_time", "unet_encoder", "unet_decoder"),
        "controlnet_local": ("local_time", "local_condition", "local_branch"),
        "controlnet_global": ("global_time", "global_condition", "global_branch"),
        "vae": ("vae_decoder",),
    }
    assert set(baseline_parts(())) == {"unet", "vae"}
