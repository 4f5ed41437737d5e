"""The baseline of ID-Patch's engines computes its published equations, and is measured beside them."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.contenders import baseline_of
from benchmarks.flops import flops_per_row
from benchmarks.id_patch_pipeline import IdPatchPipeline, check_two_rows
from benchmarks.latency import main
from benchmarks.measure import relative_rms
from benchmarks.options import Options, has_persons
from benchmarks.scene import Scene
from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from realisid_trt import Control, Person
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from realisid_trt.manifest import Manifest
from tests.methods import CHECKPOINTS, built_method
from tests.realisid_trt.id_patch_equations import IdPatchModels, id_patch_latents

PROMPT, NEGATIVE, STEPS = "two friends raise a glass", "blurry, dark", 5
HEIGHT, WIDTH = 96, 160
NOSES = [(40.0, 30.0), (WIDTH / 2 + 0.5, 50.0), (100.0, 60.0), (WIDTH - 1.0, HEIGHT - 1.0)]


@lru_cache
def pipeline_of(folder: Path) -> IdPatchPipeline:
    return IdPatchPipeline(Checkpoint.open(folder))


@lru_cache
def models_of(folder: Path, dtype: torch.dtype) -> IdPatchModels:
    return IdPatchModels(folder, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of tests.methods, without its engine."""
    return make_checkpoint(tmp_path_factory.mktemp("idpatch") / "checkpoint", **CHECKPOINTS["idpatch"])


def embeddings_of(count: int) -> np.ndarray:
    vectors = np.random.default_rng(6).standard_normal((count, 512))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def drawing_of() -> np.ndarray:
    return np.random.default_rng(7).random((3, HEIGHT, WIDTH)).astype(np.float32)


def noise_of(checkpoint: Checkpoint) -> np.ndarray:
    shape = 1, checkpoint.latent_channels, *(side // checkpoint.vae_scale_factor for side in (HEIGHT, WIDTH))
    return np.random.default_rng(8).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("count", "ratio"), [(0, 0.8), (1, 0.8), (2, 0.5), (4, None), (2, 0.0)])
def test_it_is_the_published_equations(folder: Path, count: int, ratio: float | None) -> None:
    pipeline, rows_of_steps = pipeline_of(folder), list[int]()
    noise = noise_of(pipeline.checkpoint)
    # Lengths are not 1: the embeddings get the face encoder's norm.
    persons = [Person(embedding=3 * e, at=nose) for e, nose in zip(embeddings_of(count), NOSES, strict=False)]
    result = pipeline.generate(
        PROMPT, persons, noise, negative_prompt=NEGATIVE, num_inference_steps=STEPS,
        subject_conditioning_ratio=ratio, controls={"id_patch": Control(drawing_of())},
        progress=lambda done, total: rows_of_steps.append(pipeline.usage.rows["unet"]),
    )  # fmt: skip
    exact, single = (
        id_patch_latents(
            models_of(folder, dtype), PROMPT, NEGATIVE, torch.from_numpy(embeddings_of(count)), NOSES[:count],
            torch.from_numpy(drawing_of()), torch.from_numpy(noise), STEPS, ratio,
        ).double().numpy()
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip
    assert relative_rms(result.latents, exact) <= 2 * relative_rms(single, exact)
    assert rows_of_steps == [2, 4, 6, 8, 10]
    assert result.rows["controlnet_id_patch"] == 2 * STEPS and result.rows["vae"] == 1
    assert result.image is not None and result.image.shape == (HEIGHT, WIDTH, 3)
    parts = sum(ms for stage, ms in result.timings.items() if stage.startswith("denoise."))
    assert parts <= result.timings["denoise"] and sum(result.step_ms) <= result.timings["denoise"]


def test_persons_are_projected_once(folder: Path) -> None:
    pipeline = IdPatchPipeline(Checkpoint.open(folder))
    persons = [Person(embedding=e, at=nose) for e, nose in zip(embeddings_of(2), NOSES, strict=False)]
    given: dict[str, Any] = {"num_inference_steps": 1, "controls": {"id_patch": Control(drawing_of())}}
    rows = [pipeline.generate("", persons, noise_of(pipeline.checkpoint), **given).rows for _ in range(2)]
    assert [each.get("id_encoder") for each in rows] == [2, None]


def test_another_net_beside_it(folder: Path) -> None:
    """In its window its residuals are added; before that it does not run."""
    checkpoint = Checkpoint.open(folder)
    of_patches, *_ = checkpoint.config.table
    other = dataclasses.replace(
        of_patches, name="depth", condition="image", tokens="text", pooled="zeros", scale=0.5, start=0.5, style=None
    )
    components = {**checkpoint.components, "controlnet_depth": checkpoint.components["controlnet_id_patch"]}
    both = dataclasses.replace(
        checkpoint, components=components, config=dataclasses.replace(checkpoint.config, branches=(of_patches, other))
    )
    pipeline, drawing = IdPatchPipeline(both), Control(drawing_of())
    [person] = [Person(embedding=embeddings_of(1)[0], at=NOSES[0])]
    made = [
        pipeline.generate("", [person], noise_of(checkpoint), num_inference_steps=2, controls=controls)
        for controls in ({"id_patch": drawing}, {"id_patch": drawing, "depth": drawing})
    ]
    assert [result.rows.get("controlnet_depth") for result in made] == [None, 2]
    assert made[1].rows["merge"] == 2 and relative_rms(made[1].latents, made[0].latents) > 1e-3


def test_what_it_does_not_do_is_refused(folder: Path) -> None:
    pipeline = pipeline_of(folder)
    with pytest.raises(RequestError, match=r"no face front end: give Person\(embedding=…, at=…\)\."):
        pipeline.generate("", [Person("alice.jpg")], noise_of(pipeline.checkpoint), num_inference_steps=1)
    config = pipeline.config
    with pytest.raises(RequestError, match="id_guidance_scale 4 asks for a third. .*alone: --baseline none"):
        check_two_rows(dataclasses.replace(config, id_guidance_scale=4.0))
    of_persons = {"name": "local", "view": "face", "condition": "pose", "tokens": "text", "pooled": "zeros"}
    mixed = RealisIDConfig.from_dict({**config.to_dict(), "branches": [of_persons]})
    with pytest.raises(RequestError, match="the branch local has one for each person. .*alone: --baseline none"):
        check_two_rows(mixed)


def test_it_is_the_baseline_of_engines_that_read_ids_after_the_text(folder: Path) -> None:
    assert baseline_of(Checkpoint.open(folder)) is IdPatchPipeline


def test_options_of_an_engine_of_id_patch() -> None:
    config, plain = RealisIDConfig.from_dict({"method": "idpatch"}), Options(engine=Path("e"))
    assert has_persons(config) and plain.of_engine(config).persons == (1, 2)
    for controls in ("all", "none", "id_patch"):
        [shown] = dataclasses.replace(plain, controls=(controls,)).shown(config)
        assert shown.name == "id_patch"
    for name in ("naive-shared", "naive-no-delay"):
        with pytest.raises(RequestError, match=f"--baseline {name}: where the ID is read after the text, all rows"):
            dataclasses.replace(plain, baseline=(name,)).of_engine(config)


@pytest.mark.slow("controlnet")  # builds engines of other tables
def test_the_scene() -> None:
    of = built_method("idpatch")
    manifest = Manifest.read(of.engine)
    scene = Scene.of(Options(engine=of.engine, steps=10), manifest)
    assert (scene.switch, scene.warm_steps) == (2, 4)  # i < 10·(1 - 0.8); of four steps the first has no ID
    assert list(scene.controls) == ["id_patch"]
    first, second = scene.persons(2)
    for person in (first, second):
        assert person.embedding is not None and np.linalg.norm(person.embedding) == pytest.approx(1, abs=1e-6)
        assert person.at is not None and person.box is person.pose_image is person.id_tokens is None
    assert first.at != second.at and not np.array_equal(first.embedding, second.embedding)


@pytest.mark.slow("controlnet")
def test_an_engine_of_id_patch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of, out = built_method("idpatch"), tmp_path / "results.json"
    line = ["--engine", str(of.engine), "--checkpoint", str(of.checkpoint), "--steps", str(STEPS), "--runs", "1"]
    line += ["--warmup", "0", "--threads", "1", "--memory-format", "contiguous", "--persons", "0", "1", "2"]
    assert main([*line, "--out", str(out), "--plot", str(tmp_path / "plot.png")]) == 0
    result = json.loads(out.read_text())
    assert "id_patch 2, encoder 2, decoder 2" in capsys.readouterr().out
    manifest, checkpoint = Manifest.read(of.engine), Checkpoint.open(of.checkpoint)
    side = manifest.model.default_size
    for case in result["cases"]:
        persons, contenders = case["persons"], case["contenders"]
        assert case["ratios"]["naive"]["latents_relative_rms"] < 1e-4
        expected = {"id_patch_branch": 2, "unet_encoder": 2, "unet_decoder": 2}
        phases = {"without_id": 77, "with_id": 77 + 16 * persons} if persons else {"without_id": 77}
        tflop = {"engine": 0.0, "naive": 0.0}
        for phase, tokens in phases.items():
            per_row = flops_per_row(manifest, side, side, checkpoint, tokens)
            assert contenders["engine"]["step_rows"][phase] == expected
            assert contenders["naive"]["step_rows"][phase] == {"controlnet_id_patch": 2, "unet": 2}
            steps = 1 if persons and phase == "without_id" else STEPS - 1 if persons else STEPS
            for name, contender in contenders.items():
                step = sum(count * per_row[network] for network, count in contender["step_rows"][phase].items()) / 1e12
                assert contender["step_tflop"][phase] == pytest.approx(step, rel=1e-12)
                tflop[name] += steps * step
        for name, contender in contenders.items():
            once = sum(
                contender["rows"].get(network, 0) * flops_per_row(manifest, side, side, checkpoint, 77)[network]
                for network in (
                    "text_encoder", "text_encoder_2", "id_encoder", "id_patch_condition", "id_patch_time", "unet_time",
                    "vae_decoder", "vae",
                )
            )  # fmt: skip
            assert contender["tflop"] == pytest.approx(tflop[name] + once / 1e12, rel=1e-12)
    with_id = [case["contenders"]["engine"]["step_tflop"]["with_id"] for case in result["cases"][1:]]
    assert with_id[0] < with_id[1]


@pytest.mark.slow("controlnet")
def test_operations_of_other_numbers_of_tokens_need_the_checkpoint() -> None:
    of = built_method("idpatch")
    manifest = Manifest.read(of.engine)
    side = manifest.model.default_size
    listed, one = (flops_per_row(manifest, side, side, None, tokens) for tokens in (None, 93))
    assert listed == one == flops_per_row(manifest, side, side, Checkpoint.open(of.checkpoint), 93)
    with pytest.raises(RequestError, match="of rows of 109 tokens .* those of 93 tokens only. Give --checkpoint too"):
        flops_per_row(manifest, side, side, None, 109)


@pytest.mark.slow("controlnet")
def test_the_stages_of_a_photo(photos: Any, tmp_path: Path) -> None:
    of, out = built_method("idpatch"), tmp_path / "results.json"
    line = ["--engine", str(of.engine), "--baseline", "none", "--persons", "1", "--steps", "1", "--runs", "1"]
    assert main([*line, "--warmup", "0", "--photo", str(photos.astronaut), "--out", str(out)]) == 0
    stages = ["decode", "detect+landmarks", "align", "face_encoder", "id_encoder"]
    assert list(json.loads(out.read_text())["photo"]) == stages
