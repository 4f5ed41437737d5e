"""Engines of ID-Patch: what their manifest says, and other rules of a config, compared with the reference."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.build import build
from export.building.describe import _id_encoder_key
from export.checkpoint import Checkpoint
from export.miniature import make_checkpoint
from export.options import Options
from realisid_trt.commands.inspect_engine import inspect_engine
from realisid_trt.manifest import Manifest
from tests.methods import built_method


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_identity_depends_on_the_face_encoder_alone(tmp_path: Path) -> None:
    """It holds the embedding. So projections may be trained further, and a face encoder may get another name."""
    folder = make_checkpoint(tmp_path / "checkpoint", method="idpatch")
    key = _id_encoder_key(Checkpoint.open(folder))
    file = folder / "id_projection" / "model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    edit(folder / "face_encoder" / "config.json", name="another name", licence="MIT")
    assert _id_encoder_key(Checkpoint.open(folder)) == key
    for change in ({"norm": "raw"}, {"colour": "rgb"}, {"points": "mtcnn"}, {"mean": 0.0}, {"std": 1.0}):
        before = (folder / "face_encoder" / "config.json").read_text()
        edit(folder / "face_encoder" / "config.json", **change)
        assert _id_encoder_key(Checkpoint.open(folder)) != key, change
        (folder / "face_encoder" / "config.json").write_text(before)
    other = make_checkpoint(tmp_path / "other", method="idpatch", seed=1)  # another encoder of the same shape
    assert _id_encoder_key(Checkpoint.open(other)) != key
    assert _id_encoder_key(Checkpoint.open(make_checkpoint(tmp_path / "text", method="controlnet"))) is None


@pytest.fixture
def own_id_patch(tmp_path: Path) -> Options:
    """A checkpoint of ID-Patch and its finished engine, both copies that a test may change."""
    found = built_method("idpatch")
    checkpoint = Path(shutil.copytree(found.checkpoint, tmp_path / "checkpoint"))
    engine = Path(shutil.copytree(found.engine, tmp_path / "engine"))
    return Options(checkpoint=checkpoint, out=engine, backends=("onnxruntime",))


@pytest.mark.slow("controlnet")
def test_the_engine_holds_the_face_encoder_and_says_how_it_is_fed(own_id_patch: Options) -> None:
    checkpoint, out = own_id_patch.checkpoint, own_id_patch.out
    assert checkpoint is not None and out is not None
    manifest = Manifest.read(out)
    manifest.check_files()
    described = json.loads((checkpoint / "face_encoder" / "config.json").read_text())
    assert manifest.model.face_encoder == described
    line = (
        "face encoder random numbers: colours bgr, embeddings of length 1, aligned by MTCNN's five points, cut to "
        "whole px, licence: no licence was found: ask its publisher"
    )
    assert line in inspect_engine(str(out)).lines
    assert manifest.values["files"]["face_encoder/arcface.onnx"]["sha256"] == described["sha256"]
    assert (manifest.model.num_id_tokens, manifest.model.image_size) == (16, 0)
    assert set(manifest.constants) == {"alphas_cumprod", "null_id_tokens"}
    null = Checkpoint.open(checkpoint).null_id_tokens()
    assert torch.equal(torch.from_numpy(manifest.constants["null_id_tokens"]), null)
    build_ = manifest.build_for("onnxruntime")
    for name, network in manifest.networks(build_).items():
        axes = [str(size) for port in network.inputs for size in port.shape if "tokens" in str(size)]
        assert axes == (["tokens in 77..205"] if name in ("unet_encoder", "unet_decoder", "id_patch_branch") else [])
        shapes = manifest.values["networks"][name]["builds"][build_.id]["parity"]["shapes"]
        assert [each["tokens"] for each in shapes] == [77, 205]


# Other rules than the published ones → the networks that they change.
RULES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "three-way, with null IDs before the switch": (
        {"id_guidance_scale": 3.0, "delayed_id": "null", "delay_rule": "inclusive", "null_id": "zero_tokens"}, [],
    ),
    "patches alone": (
        {
            "unet_tokens": "text", "delayed_id": "null",
            "branches": [{"name": "id_patch", "condition": "id_patches", "tokens": "text", "pooled": "zeros"}],
        },
        ["id_patch_branch", "unet_decoder", "unet_encoder"],
    ),
    "tokens alone": (
        {
            "branches": [
                {"name": "id_patch", "condition": "image", "tokens": "text_and_id", "pooled": "per_row", "end": 0.5}
            ],
            "patch_px": None,
        },
        ["id_encoder", "id_patch_condition"],
    ),
}  # fmt: skip


@pytest.mark.slow("controlnet")
@pytest.mark.parametrize("rule", RULES)
def test_other_rules_are_compared_with_the_reference(rule: str, own_id_patch: Options) -> None:
    changes, changed = RULES[rule]
    assert own_id_patch.checkpoint is not None
    edit(own_id_patch.checkpoint / "realisid_config.json", **changes)
    result = build(dataclasses.replace(own_id_patch, jobs=1))
    [figures] = result["verified"].values()
    assert 0 < figures["ratio"] <= 4 and 0 < figures["ratio_noise_pred"] <= 4
    assert sorted(name.split(":")[0] for name in result["built"] if ":opset" in name) == changed
