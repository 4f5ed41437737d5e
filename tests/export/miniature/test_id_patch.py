"""The checkpoint of `--method idpatch`: ID-Patch's published shapes in small, alive, with an encoder that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from export.adopt.schedule import read_schedule
from export.checkpoint import Checkpoint
from export.checkpoint.face_encoder import check_graph, read_face_encoder
from export.miniature import make_checkpoint, modules_of, recipe_of
from export.truth.reference import Reference, ReferenceControl, ReferencePerson
from export.truth.verify import rms_of
from realisid_trt import Sampler
from realisid_trt.errors import RequestError
from realisid_trt.persons.faces.cv_net import CvNet
from tests.export.adopt.published import SCHEDULERS
from tests.export.miniature.digests import digests


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("made") / "idpatch", method="idpatch"))


def test_at_full_size_the_projections_have_the_published_numbers() -> None:
    """51 tensors each; together the 666 MB that were published, in float32."""
    modules = modules_of(recipe_of(preset="sdxl", method="idpatch"), Path())
    assert "image_encoder" not in modules
    sizes = {}
    for name in ("id_projection", "id_patch_projection"):
        weights = modules[name][1].state_dict()
        assert len(weights) == 51
        sizes[name] = sum(weight.numel() for weight in weights.values())
    assert sizes == {"id_projection": 81_978_624, "id_patch_projection": 84_589_568}


@torch.no_grad()
def test_diffusers_own_loader_reads_both_projections(made: Checkpoint) -> None:
    """IP-Adapter-plus: it counts the heads by their width of 64, and has four layers."""
    unet = UNet2DConditionModel.from_pretrained(made.path / "unet")
    embedding = torch.nn.functional.normalize(torch.randn(3, 1, 512), dim=-1)
    for name, ours in (
        ("id_projection", made.load_id_projection()), ("id_patch_projection", made.load_patch_projection()),
    ):  # fmt: skip
        weights = load_file(made.path / name / "model.safetensors")
        theirs = unet._convert_ip_adapter_image_proj_to_diffusers(weights).eval()
        assert rms_of((ours(embedding) - theirs(embedding)).numpy()) < 1e-6


def test_the_face_encoder_runs_in_opencv_and_tells_pictures_apart(made: Checkpoint) -> None:
    folder = made.path / "face_encoder"
    encoder = read_face_encoder(folder)
    assert (encoder.size, encoder.output_dim, encoder.norm, encoder.licence) == (112, 512, "unit", None)
    check_graph(folder / encoder.file)
    net, rng = CvNet(folder / encoder.file), np.random.default_rng(0)
    first, second = (
        next(iter(net(rng.uniform(-1, 1, (1, 3, 112, 112)).astype(np.float32)).values())).ravel() for _ in range(2)
    )
    assert first.shape == (512,)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert cosine < 0.95


def test_the_same_seed_gives_the_same_bytes(made: Checkpoint, tmp_path: Path) -> None:
    first = digests(made.path)
    assert digests(make_checkpoint(tmp_path / "again", method="idpatch")) == first
    other = digests(make_checkpoint(tmp_path / "other", method="idpatch", seed=1))
    assert {name for name in first if first[name] != other[name]} >= {
        "face_encoder/arcface.onnx", "face_encoder/config.json", "id_patch_projection/model.safetensors",
    }  # fmt: skip


def test_schedule_and_sampler_are_as_adopt_writes_them(made: Checkpoint, tmp_path: Path) -> None:
    """Of the published base model, whose sampler is Euler with "leading" spacing and an offset of 1."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS["sdxl"]))
    adopted = read_schedule(tmp_path / "scheduler")
    assert json.loads((made.path / "realisid_config.json").read_text())["sampler"] == adopted.config["sampler"]
    assert made.config.sampler == adopted.sampler == Sampler("euler")
    ours = json.loads((made.path / "scheduler" / "scheduler_config.json").read_text())
    assert adopted.scheduler.items() <= ours.items()
    assert (made.scheduler_config["timestep_spacing"], made.scheduler_config["steps_offset"]) == ("leading", 1)
    other = make_checkpoint(tmp_path / "other", method="idpatch", sampler="unipc")
    assert Checkpoint.open(other).config.sampler == Sampler("unipc")


@pytest.mark.parametrize("method", ["realisid", "controlnet", "mixed"])
def test_other_methods_have_no_sampler_of_their_own(method: str) -> None:
    recipe = recipe_of(method=method)
    assert recipe.realisid.sampler is None and not {"sampler", "steps"} & set(recipe.realisid.to_dict())


def test_the_id_and_its_place_change_the_picture(made: Checkpoint) -> None:
    """By tokens and by patches, each alone too."""
    reference, rng = Reference(made), np.random.default_rng(0)
    side = made.sample_size * made.vae_scale_factor
    latents = torch.from_numpy(rng.standard_normal((1, 4, made.sample_size, made.sample_size)))
    drawing = ReferenceControl(torch.from_numpy(rng.random((3, side, side))))
    embeddings = torch.from_numpy(rng.standard_normal((2, 512)))

    def noise_pred(embedding: torch.Tensor, nose: tuple[float, float], ratio: float | None = None, **more: Any) -> Any:
        person = ReferencePerson(embedding=embedding, anchor=nose)
        final = reference.generate(
            "a friend", [person], latents, num_inference_steps=1, subject_conditioning_ratio=ratio,
            controls={"id_patch": ReferenceControl(drawing.image, **more)},
        )  # fmt: skip
        return final.numpy()

    centre = (side / 2, side / 2)
    base = noise_pred(embeddings[0], centre)
    changed = {
        "another ID": (base, noise_pred(embeddings[1], centre)),
        "another place": (base, noise_pred(embeddings[0], (side / 4, side / 3))),
        "no ID tokens": (base, noise_pred(embeddings[0], centre, ratio=0.0)),
        "another ID, in tokens of the UNet alone": [noise_pred(each, centre, scale=0.0) for each in embeddings],
        "another ID, in patches alone": [noise_pred(each, centre, ratio=0.0) for each in embeddings],
    }
    for what, (one, other) in changed.items():
        change = rms_of(other - one) / rms_of(one)
        assert change >= 0.01, f"{what} changes the prediction by {change:.2%}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"projection": "linear"}, "method idpatch has resamplers. Leave --projection out."),
        ({"null_id": "zero_image"}, 'null_id is "zero_image", and id_input "aligned_face" has no image encoder'),
        ({"patch_px": 0}, "patch_px is 0, expected a whole number of pixels from 1 to 1024"),
    ],
)
def test_what_cannot_be_made(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        make_checkpoint(tmp_path / "made", method="idpatch", **options)
    assert sentence in str(caught.value) and not list(tmp_path.iterdir())
