"""An aligned face as an embedding: colours, scale, norm, and another file than the build's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from realisid_trt.errors import EngineDamaged, NumericsError, RequestError
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.face_encoder import FaceEncoder, in_norm
from realisid_trt.persons.photo import LoadedPhoto
from tests.export.checkpoint.encoders import write_encoder


def encoder(folder: Path, **changes: Any) -> FaceEncoder:
    write_encoder(folder, **changes)
    return FaceEncoder(folder, json.loads((folder / "config.json").read_text()))


def by_hand(folder: Path, rgb: Any, bgr: bool, mean: float = 127.5, std: float = 127.5) -> Any:
    """What ONNX Runtime gives for the face, prepared channel by channel."""
    channels = [rgb[:, :, number] for number in ((2, 1, 0) if bgr else (0, 1, 2))]
    image = np.stack([(channel.astype(np.float64) - mean) / std for channel in channels])[None].astype(np.float32)
    session = onnxruntime.InferenceSession(str(folder / "arcface.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0][0]


@pytest.fixture
def face(hopper: LoadedPhoto, finder: FaceFinder, tmp_path: Path) -> Any:
    return encoder(tmp_path / "any").alignment(hopper, finder.find(hopper))


@pytest.mark.parametrize(
    ("changes", "bgr"),
    [({"colour": "bgr"}, True), ({"colour": "rgb"}, False), ({"colour": "rgb", "mean": 10, "std": 50}, False)],
)
def test_colours_and_scale(tmp_path: Path, face: Any, changes: dict[str, Any], bgr: bool) -> None:
    made = encoder(tmp_path, norm="raw", **changes)
    numbers = {key: changes[key] for key in ("mean", "std") if key in changes}
    expected = by_hand(tmp_path, face, bgr, **numbers)
    found = made.embed(face)
    assert found.shape == (512,) and found.dtype == np.float32
    length = np.linalg.norm(expected)
    assert np.abs(found - expected).max() < 1e-5 * length
    assert np.abs(found - by_hand(tmp_path, face, not bgr, **numbers)).max() > 1e-3 * length  # the other order


def test_norms(tmp_path: Path, face: Any) -> None:
    raw, unit = encoder(tmp_path, norm="raw").embed(face), encoder(tmp_path, norm="unit").embed(face)
    assert abs(np.linalg.norm(raw) - 1) > 0.1 and abs(np.linalg.norm(unit.astype(np.float64)) - 1) < 1e-6
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw), rtol=1e-5, atol=1e-7)


def test_a_unit_norm_given_twice_changes_no_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for scale in (1e-12, 1e-3, 1, 20, 1e12):
        for _ in range(50):
            once = in_norm((scale * rng.standard_normal(512)).astype(np.float32), "unit")
            assert abs(np.linalg.norm(once.astype(np.float64)) - 1) < 1e-6
            assert in_norm(once, "unit").tobytes() == once.tobytes()
    raw = rng.standard_normal(512).astype(np.float32)
    assert in_norm(raw, "raw") is raw


def test_embeddings_of_a_callers_own(tmp_path: Path) -> None:
    of_raw, of_unit = (encoder(tmp_path / norm, norm=norm).checked for norm in ("raw", "unit"))
    direction = np.arange(512, dtype=np.float32)
    unit = in_norm(direction, "unit")
    assert np.array_equal(of_raw(direction.tolist(), "person 1"), direction)
    assert of_unit(direction, "person 1").tobytes() == of_unit(unit, "person 1").tobytes() == unit.tobytes()
    message = (
        r"embedding of person 2 looks normalised \(its length is .*trained with raw ones.*not its normed_embedding"
    )
    for scale in (1, 0.9995, 1.0005):
        with pytest.raises(RequestError, match=message):
            of_raw(unit * np.float32(scale), "person 2")
    assert np.array_equal(of_raw(unit, "person 2", of_identity=True), unit)
    of_raw(unit * np.float32(1.01), "person 2")
    for checked in (of_raw, of_unit):
        with pytest.raises(RequestError, match="embedding of person 2 is all zeros: it is nobody's"):
            checked(np.zeros(512), "person 2", of_identity=True)
        with pytest.raises(RequestError, match=r"embedding of person 2 has shape \(511,\), expected \(512,\)"):
            checked(np.ones(511), "person 2")
        with pytest.raises(RequestError, match="embedding of person 2 holds NaN"):
            checked(np.full(512, np.nan), "person 2")


def test_nan_is_found(tmp_path: Path, face: Any) -> None:
    with (
        np.errstate(over="ignore"),
        pytest.raises(NumericsError, match=r"the embedding of alice.jpg holds 512 NaN or infinite of 512 values"),
    ):
        encoder(tmp_path, std=1e-38).embed(face, "alice.jpg")


def test_photo_and_face_at_once(tmp_path: Path, hopper: LoadedPhoto, finder: FaceFinder) -> None:
    """A lying photo has the embedding of the upright one, and other whole points another."""
    made, found = encoder(tmp_path / "exact", points="mtcnn"), finder.find(hopper)
    embedding = made(hopper, found)
    assert np.array_equal(embedding, made.embed(made.alignment(hopper, found)))
    lying = hopper.turned(3)
    assert np.array_equal(made(lying, finder.find(lying)), embedding)
    assert not np.array_equal(encoder(tmp_path / "whole", points="mtcnn-whole")(hopper, found), embedding)


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineDamaged, match="manifest says 000000000000…: it is another face encoder. Build it again"):
        encoder(tmp_path, sha256="0" * 64)
    (tmp_path / "arcface.onnx").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(EngineDamaged, match="arcface.onnx is missing or unreadable .*Build it again"):
        FaceEncoder(tmp_path, config)


def test_another_width_is_refused(tmp_path: Path, face: Any) -> None:
    with pytest.raises(EngineDamaged, match=r"gives \(1, 512\), expected \(1, 256\)"):
        encoder(tmp_path, output_dim=256).embed(face)
