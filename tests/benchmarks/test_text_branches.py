"""Baselines and reports of engines with ControlNets that read the text, alone or beside RealisID's."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.baseline import BaselineResult
from benchmarks.compiled import compiled, every_shape, nothing_new
from benchmarks.diffusers_pipeline import DiffusersPipeline
from benchmarks.latency import main
from benchmarks.measure import relative_rms
from benchmarks.naive import NaivePipeline
from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from export.truth.reference import Reference, ReferenceControl, ReferencePerson
from export.truth.verify_engine import WORST_RATIO
from realisid_trt import Control, Person
from realisid_trt.errors import RequestError
from tests.benchmarks.support import STEPS
from tests.methods import CHECKPOINTS, built_method

pytestmark = pytest.mark.slow("controlnet")  # builds engines of other tables

PROMPT, SIDE = "two friends hiking", 128
WINDOWED = {"openpose": (0.8, 0.0, 0.7), "depth": (1.2, 0.3, 1.0)}
THREE = 3  # steps: each branch takes part in two of them


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """checkpoint_of("mixed"): one of tests.methods, without its engine."""

    @lru_cache
    def make(name: str) -> Checkpoint:
        return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp(name) / "checkpoint", **CHECKPOINTS[name]))

    return make


def noise(checkpoint: Checkpoint) -> NDArray[np.float32]:
    side = SIDE // checkpoint.vae_scale_factor
    return np.random.default_rng(4).standard_normal((1, checkpoint.latent_channels, side, side)).astype(np.float32)


def controls_of(checkpoint: Checkpoint) -> dict[str, Control]:
    rng = np.random.default_rng(5)
    return {
        branch.name: Control(rng.random((3, SIDE, SIDE)).astype(np.float32), *WINDOWED[branch.name])
        for branch in checkpoint.config.table
        if branch.per == "picture"
    }


def persons_of(checkpoint: Checkpoint, count: int) -> list[Person]:
    rng = np.random.default_rng(3)
    shape = checkpoint.num_id_tokens, checkpoint.cross_attention_dim
    return [
        Person(
            id_tokens=rng.standard_normal(shape).astype(np.float32),
            pose_image=rng.random((3, SIDE, SIDE)).astype(np.float32).round(),
            box=box,
        )
        for box in [(5, 10, 69, 75), (40, 20, 120, 91)][:count]
    ]


def check(checkpoint: Checkpoint, result: BaselineResult, persons: list[Person], negative: str | None = None) -> None:
    """The picture is the reference's, to the rounding of float32."""
    given = [
        ReferencePerson(
            id_tokens=torch.as_tensor(person.id_tokens),
            pose_image=torch.as_tensor(person.pose_image),
            box=tuple(person.box or ()),  # type: ignore[arg-type]
        )
        for person in persons
    ]
    controls = {
        name: ReferenceControl(torch.as_tensor(control.image), control.scale, control.start, control.end)
        for name, control in controls_of(checkpoint).items()
    }
    exact, single = (
        Reference(checkpoint, dtype)
        .generate(
            PROMPT, given, torch.from_numpy(noise(checkpoint)), negative_prompt=negative, controls=controls,
            num_inference_steps=THREE, subject_conditioning_ratio=checkpoint.config.subject_conditioning_ratio,
        )
        .double()
        .numpy()
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip
    assert relative_rms(result.latents, exact) <= WORST_RATIO * relative_rms(single, exact)


@pytest.mark.parametrize(("count", "share"), [(0, False), (2, False), (2, True)])
def test_the_script_is_the_reference(checkpoint_of: Any, count: int, share: bool) -> None:
    """A text branch in two of three steps, with guidance rows (none, text), then (none, text, full) for persons."""
    checkpoint = checkpoint_of("mixed")
    persons = persons_of(checkpoint, count)
    result = NaivePipeline(checkpoint).generate(
        PROMPT, persons, noise(checkpoint), num_inference_steps=THREE, controls=controls_of(checkpoint),
        share_null=share,
    )  # fmt: skip
    check(checkpoint, result, persons)
    assert result.rows["controlnet_openpose"] == (2 + (3 if count and not share else 2))
    assert result.rows["unet"] == (2 + 3 + 3 if count else 2 + 2 + 2)
    assert result.rows.get("controlnet_local", 0) == (0 if not count else (1 + 2 + 2 if share else 2 + 3 + 3) * count)


@pytest.mark.parametrize("name", ["controlnet", "sd15"])
def test_diffusers_pipeline_is_the_reference(checkpoint_of: Any, name: str) -> None:
    """It runs its ControlNets in every step; the script of naive.py leaves out what has scale 0."""
    checkpoint, seen = checkpoint_of(name), []
    pipeline, controls = DiffusersPipeline(checkpoint), controls_of(checkpoint)
    result = pipeline.generate(
        PROMPT, [], noise(checkpoint), negative_prompt="blurry", num_inference_steps=THREE, controls=controls,
        progress=lambda done, total: seen.append((done, total, pipeline.usage.rows["unet"])),
    )  # fmt: skip
    check(checkpoint, result, [], "blurry")
    assert seen == [(1, THREE, 2), (2, THREE, 4), (3, THREE, 6)]
    rows = {name: count for name, count in result.rows.items() if "text" not in name}
    assert rows == {"unet": 6, "controlnet_openpose": 6, "controlnet_depth": 6, "guidance": 3, "vae": 1}
    assert result.image is not None and result.image.shape == (SIDE, SIDE, 3)
    assert len(result.step_ms) == THREE and min(result.step_ms) > 0
    assert set(result.timings) >= {"text", "conditions", "denoise", "vae", "denoise.unet", "denoise.controlnet_depth"}
    parts = sum(ms for stage, ms in result.timings.items() if stage.startswith("denoise."))
    assert parts <= result.timings["denoise"] == pytest.approx(sum(result.step_ms))
    script = NaivePipeline(checkpoint).generate(
        PROMPT, [], noise(checkpoint), negative_prompt="blurry", num_inference_steps=THREE, controls=controls
    )
    check(checkpoint, script, [], "blurry")
    assert (script.rows["controlnet_openpose"], script.rows["controlnet_depth"]) == (2 * 2, 2 * 2)


def test_diffusers_pipeline_with_fewer_controlnets(checkpoint_of: Any) -> None:
    """With one, and with none, it is the script."""
    checkpoint = checkpoint_of("controlnet")
    diffusers, script, controls = DiffusersPipeline(checkpoint), NaivePipeline(checkpoint), controls_of(checkpoint)
    for names in (("depth",), ()):
        given: dict[str, Any] = {"num_inference_steps": 2, "controls": {name: controls[name] for name in names}}
        ours, theirs = (each.generate(PROMPT, [], noise(checkpoint), **given) for each in (diffusers, script))
        assert relative_rms(ours.latents, theirs.latents) < 1e-5
        assert [name for name in ours.rows if "controlnet" in name] == [f"controlnet_{name}" for name in names]
    with pytest.raises(RequestError, match="cannot show given persons: leave persons out"):
        diffusers.generate(PROMPT, [Person("alice.jpg")], noise(checkpoint))


def test_diffusers_pipeline_is_compiled_once(checkpoint_of: Any) -> None:
    checkpoint = checkpoint_of("controlnet")
    eager, graphs = DiffusersPipeline(checkpoint), []
    given: dict[str, Any] = {"num_inference_steps": THREE, "controls": controls_of(checkpoint)}

    def passing_on(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with every_shape():
        ours = compiled(eager, passing_on)
        ours.generate(PROMPT, [], noise(checkpoint), **given)
        # The UNet; both ControlNets, which have one shape, with each scale: 0.8, 1.2, and 0 outside a window.
        assert len(graphs) == 1 + 3
        with nothing_new():
            again = ours.generate(PROMPT, [], noise(checkpoint), **given)
    assert np.array_equal(again.latents, eager.generate(PROMPT, [], noise(checkpoint), **given).latents)
    assert again.rows == eager.generate(PROMPT, [], noise(checkpoint), **given).rows


def measured(name: str, out: Path, *more: str) -> dict[str, Any]:
    of = built_method(name)
    line = ["--engine", str(of.engine), "--checkpoint", str(of.checkpoint), "--steps", str(STEPS), "--runs", "1"]
    line += ["--warmup", "0", "--threads", "1", "--memory-format", "contiguous"]
    assert main([*line, "--out", str(out / "results.json"), "--plot", str(out / "plot.png"), *more]) == 0
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    return result


def test_an_engine_without_identities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured("controlnet", tmp_path)
    [case] = result["cases"]
    assert case["persons"] == 0 and result["settings"]["controls"] == ["openpose", "depth"]
    assert case["ratios"]["naive"]["latents_relative_rms"] < 1e-4
    engine, naive = case["contenders"]["engine"], case["contenders"]["naive"]
    assert engine["step_rows"]["without_id"] == {
        "openpose_branch": 2, "depth_branch": 2, "unet_encoder": 2, "unet_decoder": 2,
    }  # fmt: skip
    assert naive["step_rows"]["without_id"] == {"controlnet_openpose": 2, "controlnet_depth": 2, "unet": 2}
    assert engine["step_rows"]["with_id"] is None and engine["tflop"] < naive["tflop"]
    assert naive["rows"]["unet"] == 2 * STEPS and {"conditions", "denoise.unet"} <= set(naive["stages_ms"])
    assert "openpose 2, depth 2, encoder 2, decoder 2" in capsys.readouterr().out


def test_realisid_with_a_text_branch_and_without(tmp_path: Path) -> None:
    """Alone, and beside one person; then RealisID alone. The window of `mixed` ends in the second of two steps."""
    result = measured("mixed", tmp_path, "--persons", "0", "1", "--baseline", "naive", "naive-shared")
    alone, beside = (case["contenders"] for case in result["cases"])
    assert alone["naive"]["rows"]["controlnet_openpose"] == alone["engine"]["rows"]["openpose_branch"] == 2
    assert beside["engine"]["step_rows"] == {
        "without_id": {
            "local_branch": 1, "global_branch": 1, "openpose_branch": 2, "unet_encoder": 2, "unet_decoder": 2,
        },
        "with_id": {"local_branch": 2, "global_branch": 2, "unet_encoder": 2, "unet_decoder": 3},
    }  # fmt: skip
    for case in result["cases"]:
        assert all(ratio["latents_relative_rms"] < 1e-4 for ratio in case["ratios"].values())
    without = measured("mixed", tmp_path, "--persons", "1", "--controls", "none", "--baseline", "none")
    assert "openpose_branch" not in without["cases"][0]["contenders"]["engine"]["rows"]
