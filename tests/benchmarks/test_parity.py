"""`benchmarks.parity` on a stand-in for the published repository: its names and signatures, over our modules."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.pipelines.controlnet import pipeline_controlnet_sd_xl

from benchmarks.parity import BOUND, FED, STANDING, branch_of, differences, judge, main
from benchmarks.published import run_published
from benchmarks.reading import LATENTS, Picture, Reading
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import RequestError
from tests.methods import built_method

STEPS = 4
STAND_IN = """
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import *

from tests.realisid_trt.id_patch_equations import IdPatchModels, paste
from utils.marks import MARK


class Pipeline:
    def __init__(self, models):
        self.models, self.device = models, torch.device("cpu")
        self.unet, self.controlnet = models.unet, models.controlnet

    @torch.no_grad()
    def __call__(
        self, prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds, image,
        guidance_scale=5.0, controlnet_conditioning_scale=1.0, num_inference_steps=50, id_injection_ratio=1.0,
        output_type: Optional[str] = "pil", generator: Union[Any, List[Any]] = None, latents: Tuple | Dict = None,
    ):
        assert output_type == "latent" and latents.dtype == prompt_embeds.dtype
        tokens = torch.cat([negative_prompt_embeds, prompt_embeds])
        pooled = torch.cat([negative_pooled_prompt_embeds, pooled_prompt_embeds])
        size = image.shape[-2:]
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[*size, 0, 0, *size]] * 2, dtype=tokens.dtype)}
        scheduler = self.models.scheduler("EulerDiscreteScheduler")
        scheduler.set_timesteps(num_inference_steps)
        latents = latents * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            read = tokens[:, :77] if i < num_inference_steps * (1 - id_injection_ratio) else tokens
            both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            down, mid = self.controlnet(
                both, t, encoder_hidden_states=read, controlnet_cond=torch.cat([image] * 2).to(tokens.dtype),
                conditioning_scale=controlnet_conditioning_scale, added_cond_kwargs=added, return_dict=False,
            )
            none, full = self.unet(
                both, t, encoder_hidden_states=read, added_cond_kwargs=added, down_block_additional_residuals=down,
                mid_block_additional_residual=mid, return_dict=False,
            )[0].chunk(2)
            latents = scheduler.step(none + guidance_scale * (full - none), t, latents, return_dict=False)[0]
        return SimpleNamespace(images=latents)


class IDPatchInferencer:
    def __init__(
        self, base_model_path, idp_model_path, patch_size=64, torch_device="cuda:0", torch_dtype=torch.bfloat16
    ):
        assert (Path(idp_model_path) / "id-patch.bin").is_file() and patch_size == 64 and torch_device == "cpu"
        assert UNet2DConditionLoadersMixin().device == torch.device("cpu")  # the loader asks itself for it
        self.models = IdPatchModels(Path(base_model_path), torch_dtype)
        self.torch_dtype = torch_dtype
        self.pipe = Pipeline(self.models)

    @torch.no_grad()
    def generate(
        self, face_embeds, face_locations, control_image, prompt, negative_prompt="", guidance_scale=5.0,
        num_inference_steps=50, controlnet_conditioning_scale=0.8, id_injection_ratio=0.8, seed=-1,
    ):
        models, dtype, count = self.models, self.torch_dtype, len(face_embeds)
        noses = [tuple(nose) for nose in face_locations.to(dtype).tolist()]
        drawing = torch.from_numpy(np.array(control_image)).to(dtype).permute(2, 0, 1) / 255
        (text, pooled), (negative, negative_pooled) = models.encode_text(prompt), models.encode_text(negative_prompt)
        embeds = face_embeds.to(dtype)[:, None]
        nobody = models.prompt_proj(torch.zeros(count, 1, 512, dtype=dtype)).flatten(0, 1)[None]
        everybody = models.prompt_proj(embeds).flatten(0, 1)[None]
        patches = models.patch_proj(embeds).reshape(count, 3, 64, 64)
        return self.pipe(
            prompt_embeds=torch.cat([text, everybody], dim=1), pooled_prompt_embeds=pooled,
            negative_prompt_embeds=torch.cat([negative, nobody], dim=1),
            negative_pooled_prompt_embeds=negative_pooled, image=paste(drawing, patches, noses)[None],
            guidance_scale=guidance_scale, controlnet_conditioning_scale=controlnet_conditioning_scale,
            num_inference_steps=num_inference_steps, id_injection_ratio=id_injection_ratio, output_type="pil",
        ).images[0]
"""


def make_clone(folder: Path, **changes: str) -> Path:
    """changes: text of the stand-in → other text."""
    text = STAND_IN
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    for name, content in (("modules/inferencer.py", text), ("utils/marks.py", "MARK = 1\n")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(content, encoding="utf-8")
    (folder / "models" / "ID-Patch").mkdir(parents=True, exist_ok=True)
    (folder / "models" / "ID-Patch" / "id-patch.bin").touch()
    return folder


def arguments(clone: Path, *more: str) -> list[str]:
    of = built_method("idpatch")
    line = ["--published", str(clone), "--engine", str(of.engine), "--base", str(of.checkpoint), "--device", "cpu:1"]
    return [*line, "--steps", str(STEPS), *more]


@pytest.mark.slow("controlnet")  # builds engines of other tables
def test_an_engine_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(sys.modules), list(sys.path)
    assert main(arguments(make_clone(tmp_path), "--json")) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["passed"] and result["problems"] == [] and result["published"] is None
    assert result["tokens"] == [77, 109, 109, 109]
    assert [row["name"] for row in result["rows"]] == [
        "109 tokens of the ControlNet", "109 tokens of the UNet", "77 tokens of the ControlNet",
        "77 tokens of the UNet", "condition", "pooled text of the ControlNet", "pooled text of the UNet",
        "final latents", FED,
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["passed"] and row["rms_torch"] is None and row["bound"] == BOUND
        assert 0 <= row["rms"] < BOUND / 10
    assert "the engine is the published model" in err and "engine is NOT" not in err
    assert not {"modules", "modules.inferencer", "utils", "utils.marks"} & (set(sys.modules) - before[0])
    assert sys.path == before[1]
    assert not hasattr(pipeline_controlnet_sd_xl, "Union") and not hasattr(UNet2DConditionLoadersMixin, "device")


@pytest.mark.slow("controlnet")
@pytest.mark.parametrize(
    ("old", "new", "failed"),
    [
        # What the engine does not do. The rows that see it fail, and the others do not.
        ("paste(drawing, patches, noses)", "paste(drawing, -patches, noses)", {"condition", "final latents"}),
        ("guidance_scale * (full", "1.1 * guidance_scale * (full", {"final latents", FED}),
        (
            "torch.zeros(count, 1, 512, dtype=dtype)",
            "0.05 * torch.ones(count, 1, 512, dtype=dtype)",
            {"109 tokens of the UNet", "109 tokens of the ControlNet", "final latents"},
        ),
    ],
    ids=["patches", "guidance", "null tokens"],
)
def test_another_model_fails_where_it_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, failed: set[str]
) -> None:
    assert main(arguments(make_clone(tmp_path, change=(old, new)), "--json")) == 1  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert {row["name"] for row in result["rows"] if not row["passed"]} == failed
    assert not result["passed"] and "FAIL" in err and "the engine is NOT the published model" in err


@pytest.mark.slow("controlnet")
def test_another_delay_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = ("if i < num_inference_steps *", "if i <= 1 + num_inference_steps *")
    assert main(arguments(make_clone(tmp_path, change=change), "--json")) == 1  # type: ignore[arg-type]
    assert (
        "reads 77, 77, 109, 109 tokens step by step, that of the engine 77, 109, 109, 109." in capsys.readouterr().err
    )


@pytest.mark.slow("controlnet")
def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = make_clone(tmp_path / "clone")
    for line, message in (
        (
            arguments(tmp_path),
            f"--published {tmp_path} has no modules/inferencer.py, expected a clone of ID-Patch: git",
        ),
        (arguments(clone, "--persons", "9"), "--persons is 9, and this engine was built for "),
        (arguments(clone, "--steps", "0"), "--steps is 0, expected at least 1."),
    ):
        assert main(line) == 2
        assert message in capsys.readouterr().err
    (clone / "models" / "ID-Patch" / "id-patch.bin").unlink()
    shutil.rmtree(clone / "utils")
    assert main(arguments(clone)) == 2
    assert "could not be imported: ModuleNotFoundError: No module named 'utils'" in capsys.readouterr().err


def test_another_engine_is_refused() -> None:
    realisid, idpatch = RealisIDConfig(branch_pooled_text="zeros"), RealisIDConfig.from_dict({"method": "idpatch"})
    assert branch_of(idpatch).name == "id_patch"
    for config, names in (
        (realisid, "local, global"),
        (dataclasses.replace(idpatch, id_guidance_scale=4.0), "id_patch"),
    ):
        with pytest.raises(
            RequestError, match=rf"not ID-Patch as published \(its branches: {names}\)\. .*export.adopt"
        ):
            branch_of(config)


def test_a_clone_that_cannot_open_its_weights(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for package in ("modules", "utils"):
        (clone / package).mkdir(parents=True)
    (clone / "modules" / "inferencer.py").write_text(
        "class IDPatchInferencer:\n    def __init__(self, **given):\n        raise OSError('no such folder')\n"
    )
    with pytest.raises(
        RequestError, match=r"could not open W \(expected id-patch.bin and ControlNetModel/\) .* B: OSEr"
    ):
        run_published(clone, Path("W"), "B", None, "cpu", "float32", picture())


def picture() -> Picture:
    return Picture(
        prompt="", negative_prompt="", embeddings=np.ones((1, 512), np.float32), noses=np.zeros((1, 2)),
        drawing=np.zeros((64, 64, 3), np.uint8), latents=np.zeros((1, 4, 16, 16), np.float32), steps=1,
        guidance_scale=5.5, scale=0.8, ratio=0.8, patch_px=64,
    )  # fmt: skip


def reading(**arrays: Any) -> Reading:
    return Reading({name.replace("_", " "): np.asarray(array, np.float32) for name, array in arrays.items()})


def test_the_variant_is_that_of_the_build(tmp_path: Path) -> None:
    """The published code names no variant; a base model may have files of one alone."""
    clone = tmp_path / "clone"
    (clone / "modules").mkdir(parents=True)
    (clone / "modules" / "inferencer.py").write_text(
        "class StableDiffusionXLIDPatchPipeline:\n    @classmethod\n    def from_pretrained(cls, base, **given):\n"
        "        raise OSError(f'{base} {given}')\n\n\nclass IDPatchInferencer:\n"
        "    def __init__(self, base_model_path, **given):\n"
        "        StableDiffusionXLIDPatchPipeline.from_pretrained(base_model_path, scheduler=1)\n"
    )
    for variant, given in ((None, "{'scheduler': 1}"), ("fp16", "{'variant': 'fp16', 'scheduler': 1}")):
        with pytest.raises(RequestError, match=f"OSError: B {given}"):
            run_published(clone, Path("W"), "B", variant, "cpu", "float32", picture())


def test_a_pipeline_that_fails_is_said(tmp_path: Path) -> None:
    clone = make_clone(tmp_path)
    (clone / "modules" / "inferencer.py").write_text(
        "from types import SimpleNamespace\nfrom torch import nn\n\n\nclass IDPatchInferencer:\n"
        "    def __init__(self, **given):\n        self.pipe = SimpleNamespace(unet=nn.Linear(1, 1), "
        "controlnet=nn.Linear(1, 1))\n\n    def generate(self, *given, **more):\n        raise TypeError('no seed')\n"
    )
    with pytest.raises(
        RequestError, match="the published pipeline failed: TypeError: no seed. It was written for diff"
    ):
        run_published(clone, Path("W"), "B", None, "cpu", "float32", picture())


def test_half_precision_is_judged_by_torch_in_the_same() -> None:
    """At most four times as far from float32 as the published pipeline in half precision."""
    exact, plain = np.full(100, 2.0), np.full(100, 2.002)
    truth, torch = reading(final_latents=exact), reading(final_latents=plain)
    for error, passed in ((0.0079, True), (0.0081, False), (np.nan, False)):
        rows = judge(truth, torch, reading(final_latents=exact + error), truth)
        assert [row.passed for row in rows] == [passed, True] and [row.name for row in rows] == [LATENTS, FED]
        assert rows[0].bound == pytest.approx(4e-3, rel=1e-3) and rows[0].rms_torch == pytest.approx(1e-3, rel=1e-3)
    lacks = judge(truth, torch, reading(), reading(final_latents=exact[:50]))
    assert [(row.rms, row.passed) for row in lacks] == [(np.inf, False)] * 2
    broken = judge(truth, reading(final_latents=exact * np.nan), truth, truth)
    assert [row.passed for row in broken] == [False, False]


def test_other_timesteps_are_said() -> None:
    truth, own = Reading(timesteps=[999, 1], tokens=[77, 93]), Reading(timesteps=[751, 1], tokens=[77, 93])
    [problem] = differences(truth, own)
    assert problem.startswith("the published pipeline takes the timesteps 999, 1, the engine 751, 1. Their schedules ")
    assert differences(truth, truth) == []


def test_the_drawn_persons_stand_upright() -> None:
    """The nose is the anchor; ears beside it, ankles below knees."""
    assert STANDING.shape == (17, 2) and not STANDING[0].any()
    assert (STANDING[1::2, 0] > 0).all() and (STANDING[2::2, 0] < 0).all()  # left is the person's own: on our right
    assert STANDING[15, 1] > STANDING[13, 1] > STANDING[11, 1] > STANDING[5, 1] > 0
