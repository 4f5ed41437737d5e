"""The face models of an engine: their files, their description, and the user's files that are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.face_models import ALL_FILES, fetch_face_models
from realisid_trt.errors import BuildError
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.photo import load_photo
from tests.export.faces.tflite_sketch import face_landmarker_task


@pytest.fixture(autouse=True)
def _no_partial_files(tmp_path: Path) -> Iterator[None]:
    """Whatever a test does, no half-written file stays."""
    yield
    assert not list(tmp_path.rglob(".*"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faces")
    return folder, fetch_face_models(folder)


def test_description_is_what_lies_there(built: tuple[Path, dict[str, Any]]) -> None:
    folder, description = built
    assert set(description["files"]) == {path.name for path in folder.iterdir()} <= ALL_FILES
    for name, facts in description["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert description["landmarks"] == "attention"
    assert description["model_id"] == FaceFinder.load(folder).model_id
    assert {source["licence"] for source in description["sources"]} == {"MIT", "Apache-2.0"}
    assert all(len(source["sha256"]) == 64 for source in description["sources"])
    json.dumps(description)  # the result goes into a manifest


def test_building_again_gives_the_same_bytes(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert fetch_face_models(tmp_path) == built[1]


def test_second_build_needs_no_network(
    built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    assert fetch_face_models(tmp_path / "out") == built[1]


def test_attention_regions_come_out_of_the_file(built: tuple[Path, dict[str, Any]]) -> None:
    """The custom operators' options hold the lists: 80 lip and 2 × 71 eye landmarks, and the irises."""
    facts = json.loads((built[0] / "landmarks.json").read_text())
    regions = {region["name"]: region for region in facts["regions"]}
    assert facts["size_px"] == 192 and list(regions) == ["lips", "left_eye", "right_eye"]
    assert [len(region["subset"]) for region in regions.values()] == [80, 71, 71]
    assert regions["left_eye"]["outputs"]["left_iris"] == [468, 469, 470, 471, 472]
    assert regions["right_eye"]["outputs"]["right_iris"] == [473, 474, 475, 476, 477]
    every = [index for region in regions.values() for indices in region["outputs"].values() for index in indices]
    assert len(every) == len(set(every)) == 80 + 71 + 71 + 10


def test_wrong_task_file(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="--face-landmarker.*cannot be read"):
        fetch_face_models(tmp_path, face_landmarker=tmp_path / "face_landmarker.task")
    (tmp_path / "face_landmarker.task").write_bytes(b"no zip")
    with pytest.raises(BuildError, match="holds no face_landmarks_detector.tflite"):
        fetch_face_models(tmp_path, face_landmarker=tmp_path / "face_landmarker.task")
    assert {path.name for path in tmp_path.iterdir()} == {"face_landmarker.task"}  # nothing half-written


def test_wrong_face_parser(tmp_path: Path) -> None:
    path = tmp_path / "parser.onnx"
    with pytest.raises(BuildError, match="--face-parser.*cannot be read"):
        fetch_face_models(tmp_path, face_parser=path)
    path.write_bytes(b"neither")
    with pytest.raises(BuildError, match="parser.onnx is not a valid ONNX"):
        fetch_face_models(tmp_path, face_parser=path)
    assert [path.name for path in tmp_path.iterdir()] == ["parser.onnx"]


def test_task_becomes_the_landmark_model(tmp_path: Path) -> None:
    content, weight, bias = face_landmarker_task()
    path = tmp_path / "face_landmarker.task"
    path.write_bytes(content)
    folder = tmp_path / "faces"
    fetch_face_models(folder)  # an earlier set, of which the landmark files must go
    description = fetch_face_models(folder, face_landmarker=path)
    assert description["landmarks"] == "v2"
    assert {"landmarks_v2.onnx", "landmarks.json"} < set(description["files"])
    assert not (folder / "landmarks_body.onnx").exists() and not (folder / "landmarks_heads.onnx").exists()
    assert description["sources"][-1]["sha256"] == hashlib.sha256(content).hexdigest()

    finder = FaceFinder.load(folder)
    assert finder.model_id == description["model_id"] and finder.model_id.startswith("mtcnn+v2-")
    pixels = np.random.default_rng(1).random((1, 3, 256, 256)).astype(np.float32)
    means = pixels[0].transpose(1, 2, 0).reshape(4, 64, 4, 64, 3).mean((1, 3), dtype=np.float64)
    expected = np.tensordot(weight.astype(np.float64), means, 3) + bias
    landmarks = finder.landmark_model.net(pixels)["landmarks"]  # type: ignore[attr-defined]
    np.testing.assert_allclose(landmarks.ravel(), expected, rtol=1e-4)

    face = finder.find(load_photo(np.full((300, 300, 3), 90, np.uint8)), box=(100, 100, 200, 200))
    assert face.landmarks.shape == (478, 2)
    fetch_face_models(folder)  # and back again
    assert not (folder / "landmarks_v2.onnx").exists() and FaceFinder.load(folder).model_id != finder.model_id
