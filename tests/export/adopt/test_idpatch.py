"""ID-Patch as it is published → a checkpoint: numbers to the bit, the face encoder, what is printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from export.adopt import face_encoders, same_person
from export.adopt.__main__ import main
from export.adopt.face_encoders import PUBLISHED, EncoderRequest, Published
from export.checkpoint import Checkpoint
from export.checkpoint.files import read_weights
from export.faces import arcface
from export.miniature import make_checkpoint
from realisid_trt.errors import CheckpointError, RequestError
from realisid_trt.files import file_sha256
from realisid_trt.persons.faces.cv_net import CvNet
from tests.conftest import Photos
from tests.export.adopt.bad_idpatch import GOOD, LINE
from tests.export.adopt.published import SCHEDULERS, card, write
from tests.export.adopt.published_idpatch import PICKLE
from tests.export.adopt.test_adopt import WEIGHTS, adopt, digests, equal, opened
from tests.export.checkpoint.encoders import random_encoder
from tests.export.faces.random_arcface import SMALL_SE, random_arcface, save_as_published

PARTS = {"id_projection": "prompt_proj", "id_patch_projection": "patch_proj"}


def projection(checkpoint: Checkpoint, part: str) -> dict[str, torch.Tensor]:
    return read_weights(checkpoint.components[part].files)


def test_id_patch_becomes_a_checkpoint(here: Path, capsys: Any) -> None:
    before = digests(here)
    out = adopt(GOOD)
    assert digests(here).items() >= before.items()  # the sources are as they were
    checkpoint = opened(out)
    config = checkpoint.config
    assert config.method == "idpatch" and config.id_input == "aligned_face" and config.patch_px == 16
    assert json.loads((out / "realisid_config.json").read_text()) == {
        "method": "idpatch", "sampler": "euler", "patch_px": 16,
    }  # fmt: skip
    assert config.id_guidance_scale is None and not config.force_zeros_for_empty_prompt
    assert [row.name for row in config.table] == ["id_patch"] and config.table[0].scale == 0.8
    published = torch.load(here / PICKLE, weights_only=True)
    for part, name in PARTS.items():
        assert equal(projection(checkpoint, part), published[name])
    assert checkpoint.num_id_tokens == 4
    tokens = checkpoint.null_id_tokens()
    assert tokens.shape == (4, 64) and float(tokens.std()) > 0.01
    net = here / "ID-Patch" / "ControlNetModel" / WEIGHTS
    assert (out / "controlnet_id_patch" / WEIGHTS).stat().st_ino == net.stat().st_ino
    assert checkpoint.scheduler_config["set_alpha_to_one"] and not checkpoint.scheduler_config["clip_sample"]
    assert checkpoint.base == here / "SDXL"
    assert json.loads((out / "model_index.json").read_text())["base_model"] == "../SDXL"
    encoder = checkpoint.face_encoder
    assert encoder is not None and (encoder.colour, encoder.norm, encoder.points) == ("bgr", "unit", "mtcnn-whole")
    assert (out / "face_encoder" / "arcface.onnx").read_bytes() == (here / "arcface.onnx").read_bytes()
    assert {path.name for path in out.iterdir()} == {
        "controlnet_id_patch", "id_projection", "id_patch_projection", "face_encoder", "scheduler", "model_index.json",
        "realisid_config.json",
    }  # fmt: skip
    said = capsys.readouterr().out
    numbers = sum(tensor.numel() for tensor in published["patch_proj"].values())
    for piece in (
        f"face encoder: arcface of arcface.onnx; colours bgr, embeddings unit, input (x - 127.5)/127.5, points mtcnn-"
        f"whole, sha256 {encoder.sha256}",
        "note: the published ID-Patch was trained with ir_se50. arcface gives 512 numbers too, and they mean other",
        f"id_patch_projection: 29 tensors, {numbers / 1e6:.2f} M numbers, {4 * numbers / 1e6:.1f} MB; embedding of 512 "
        "→ 3 × 256 (dim 64, depth 2, 2 heads of 64)",
        f"id_projection of an embedding of zeros: mean {float(tokens.mean()):.4f}, standard deviation "
        f"{float(tokens.std()):.4f}, from {float(tokens.min()):.2f} to {float(tokens.max()):.2f}",
        f"sha256 of {PICKLE}: {file_sha256(here / PICKLE)}",
        f"id_patch: {net.stat().st_size / 1e6:.1f} MB of ID-Patch/ControlNetModel linked",
        "sampler: euler, the base model's own (EulerDiscreteScheduler)",
        "licence of controlnet_id_patch (ID-Patch): openrail++",
        "licence of face_encoder (arcface, arcface.onnx): no licence was found: ask its publisher",
        "ID-Patch: the restrictions of use in its licence (openrail++) travel with every copy of the weights",
        "branches id_patch. Build it: python -m export.build --checkpoint",
    ):
        assert piece in said


def test_a_miniature_returns_from_the_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoint → ControlNetModel/, id-patch.bin and .onnx → adopt → the same weights, tokens and encoder."""
    monkeypatch.chdir(tmp_path)
    made = make_checkpoint(tmp_path / "made", method="idpatch")
    given = opened(made)
    write(made / "scheduler" / "scheduler_config.json", SCHEDULERS["sdxl"])  # as the published base model has it
    shutil.copytree(made / "controlnet_id_patch", tmp_path / "ID-Patch" / "ControlNetModel")
    torch.save({name: projection(given, part) for part, name in PARTS.items()}, tmp_path / PICKLE)
    shutil.copy(made / "face_encoder" / "arcface.onnx", tmp_path)
    checkpoint = opened(adopt(GOOD.replace("SDXL", "made")))
    assert checkpoint.config == given.config
    for name in ("controlnet_id_patch", *PARTS):
        ours, theirs = checkpoint.components[name], given.components[name]
        assert equal(read_weights(ours.files), read_weights(theirs.files))
        if name in PARTS:
            assert ours.config == theirs.config
    assert torch.equal(checkpoint.null_id_tokens(), given.null_id_tokens())
    assert checkpoint.face_encoder is not None and given.face_encoder is not None
    for key in ("sha256", "colour", "norm", "points", "mean", "std", "size", "template"):
        assert getattr(checkpoint.face_encoder, key) == getattr(given.face_encoder, key)
    assert checkpoint.scheduler_config == given.scheduler_config  # of the miniature, as it was made


def test_half_and_copies(here: Path) -> None:
    checkpoint = opened(adopt(f"{GOOD} --half"))
    published = torch.load(here / PICKLE, weights_only=True)
    for part, name in PARTS.items():
        assert equal(projection(checkpoint, part), {key: value.half() for key, value in published[name].items()})
    branch = read_weights(checkpoint.components["controlnet_id_patch"].files)
    net = load_file(here / "ID-Patch" / "ControlNetModel" / WEIGHTS)
    assert equal(branch, {key: value.half() for key, value in net.items()})
    out = adopt(f"{GOOD} --copy")  # replaces our own
    ours, source = (out / "controlnet_id_patch" / WEIGHTS), here / "ID-Patch" / "ControlNetModel" / WEIGHTS
    assert ours.read_bytes() == source.read_bytes() and ours.stat().st_ino != source.stat().st_ino


def test_published_weights_of_a_face_encoder_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ir_se50's file has torch's format before 1.6, judging by its size."""
    monkeypatch.setattr(arcface, "ARCHITECTURES", (SMALL_SE,))
    module = random_arcface(SMALL_SE)
    save_as_published(module, tmp_path / "weights.pth", old=True)
    encoder = EncoderRequest.of(tmp_path / "weights.pth").write(tmp_path / "face_encoder", "mtcnn-whole")
    assert (encoder.name, encoder.colour, encoder.norm, encoder.licence) == ("small_se", "bgr", "unit", None)
    faces = np.random.default_rng(0).uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    [found] = CvNet(tmp_path / "face_encoder" / "arcface.onnx")(faces).values()
    assert np.abs(found - module(torch.from_numpy(faces)).numpy()).max() < 1e-6
    with pytest.raises(RequestError) as caught:
        EncoderRequest.of(tmp_path / "weights.pth", norm="raw").write(tmp_path / "raw", "mtcnn-whole")
    assert str(caught.value) == (
        f"--norm raw: {tmp_path / 'weights.pth'} is small_se, which normalises by itself: it gives embeddings of "
        "length 1. Leave --norm out."
    )


def test_a_file_with_a_published_name_and_other_numbers_is_told(here: Path, capsys: Any) -> None:
    """Keys, or the name of an ONNX file, do not say whose weights they are."""
    (here / "arcface.onnx").rename(here / "ir_se50.onnx")
    [listed] = [digest for digest, published in PUBLISHED.items() if published.name == "ir_se50"]
    adopt(GOOD.replace("arcface.onnx", "ir_se50.onnx"))
    said = capsys.readouterr().out
    assert (
        f"note: ir_se50.onnx is not the published file of ir_se50: sha256 {file_sha256(here / 'ir_se50.onnx')}, listed "
        f"as {listed}. Its weights may be others: use it only if you know where it comes from\n"
    ) in said
    assert "note: the published ID-Patch was trained with" not in said
    assert EncoderRequest.of(here / "ir_se50.onnx").unlike("iresnet50") is None  # which nobody published by this name


def test_a_known_file_needs_no_flags(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    known = Published("ir_se50", "bgr", "unit", "MIT, grey")
    monkeypatch.setattr(face_encoders, "PUBLISHED", {file_sha256(here / "arcface.onnx"): known})
    for folder in ("ID-Patch", "SDXL"):
        card(here / folder, "license: apache-2.0")
    checkpoint = opened(adopt(LINE))
    encoder = checkpoint.face_encoder
    assert encoder is not None
    assert (encoder.name, encoder.colour, encoder.norm, encoder.licence) == ("ir_se50", "bgr", "unit", "MIT, grey")
    said = capsys.readouterr().out
    assert "licence of face_encoder (ir_se50, arcface.onnx): MIT, grey" in said and "note:" not in said
    assert "travel with every copy" not in said
    assert main(f"{LINE} --colour rgb".split()) == 2
    assert "arcface.onnx is ir_se50, which was trained on bgr. Leave --colour out." in capsys.readouterr().err
    assert main(f"{LINE} --norm raw".split()) == 2
    assert "--norm raw: arcface.onnx is ir_se50, which normalises by itself: it gives" in capsys.readouterr().err
    assert all(len(digest) == 64 for digest in PUBLISHED) and len(PUBLISHED) == 3


def test_graphs_that_scale_pixels_are_shown_pixels(here: Path) -> None:
    """As InsightFace tells them: Sub and Mul among the names of the first eight nodes, as MXNet wrote them."""
    model = random_encoder()
    for number, name in enumerate(("_minusscalar0", "_mulscalar0")):
        model.graph.node[number].name = name
    onnx.save(model, here / "mxnet.onnx")
    encoder = EncoderRequest.of(here / "mxnet.onnx", "rgb", "raw").write(here / "face_encoder", "mtcnn")
    assert (encoder.mean, encoder.std) == (0, 1)


def test_one_more_branch_beside_id_patch(here: Path) -> None:
    adopt(GOOD)
    first = opened(here / "OUT")
    checkpoint = opened(adopt("add --checkpoint OUT --net canny=canny --out MORE"))
    assert [row.name for row in checkpoint.config.table] == ["id_patch", "canny"]
    assert checkpoint.face_encoder == first.face_encoder
    assert equal(projection(checkpoint, "id_projection"), projection(first, "id_projection"))


def test_what_the_engine_will_weigh(here: Path, capsys: Any) -> None:
    adopt(f"{GOOD} --json")
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    checkpoint = opened(here / "OUT")
    count = {name: sum(checkpoint.elements(name).values()) for name in checkpoint.components}
    decoder = sum(n for key, n in checkpoint.elements("vae").items() if key.startswith(("decoder.", "post_quant")))
    halves = sum(n for name, n in count.items() if name != "vae")
    assert values["engine_bytes"] == 2 * halves + 4 * decoder + (here / "arcface.onnx").stat().st_size


def test_three_photos_judge_the_encoder(photos: Photos, here: Path, capsys: Any) -> None:
    """Two photos of one woman, one of another person; then the other way round, and nothing is left."""
    from PIL import Image

    same = here / "same.png"
    Image.open(photos.astronaut).rotate(4, resample=Image.Resampling.BICUBIC).save(same)
    line = f"{GOOD} --check {photos.astronaut} {same} {photos.hopper}"
    adopt(line)
    said = capsys.readouterr().out
    assert "check: cosine of the same person 0." in said or "check: cosine of the same person 1." in said
    assert "expected about 0.5 and more beside 0.2 and less" in said
    assert "check: with RGB instead of BGR" in said
    assert "check: patches of the three photos from" in said
    shutil.rmtree(here / "OUT")
    assert main(f"{GOOD} --check {photos.astronaut} {photos.hopper} {same}".split()) == 1
    said = capsys.readouterr().err
    assert "does not tell" in said and "expected clearly more (about 0.5 and more beside 0.2 and less)" in said
    assert not (here / "OUT").exists() and not [path for path in here.iterdir() if path.name.startswith(".")]


def test_what_is_said_of_the_gap() -> None:
    encoder = face_encoders.FaceEncoder(
        sha256="0" * 64, colour="bgr", norm="unit", name="x", licence=None, points="mtcnn"
    )
    good, bad = same_person.Likeness(0.7, 0.1), same_person.Likeness(0.5, 0.2)
    none = np.zeros((3, 512), np.float32)
    lines = same_person.lines_of(same_person.Checked(good, bad, none), encoder)
    assert lines[0].startswith("check: cosine of the same person 0.700, of another one 0.100; expected about 0.5")
    assert lines[1].endswith("0.500 and 0.200; the gap shrinks, as it must where the colours are right")
    lines = same_person.lines_of(same_person.Checked(bad, good, none), encoder)
    assert "the gap does not shrink: the colours are probably wrong. Try other photos, then --colour rgb" in lines[1]


def test_the_checkpoint_names_the_command(here: Path) -> None:
    """A folder that holds the pickle as it is published is told how it is converted."""
    out = adopt(GOOD)
    (out / "id_projection" / "model.safetensors").unlink()
    shutil.copy(here / PICKLE, out / "id_projection")
    with pytest.raises(CheckpointError, match="python -m export.adopt idpatch --weights FOLDER"):
        Checkpoint.open(out)
