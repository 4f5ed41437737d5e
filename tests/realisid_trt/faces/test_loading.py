"""The faces/ folder: the files that are used, and the errors when one is missing or damaged."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from realisid_trt.errors import EngineDamaged
from realisid_trt.persons.faces import FaceFinder
from realisid_trt.persons.faces.landmarks import AttentionMesh
from realisid_trt.persons.photo import LoadedPhoto
from tests.realisid_trt.faces.photographs import NAMES

FILES = (
    "pnet.onnx", "rnet.onnx", "onet.onnx", "landmarks_body.onnx", "landmarks_heads.onnx", "landmarks.json",
    "person_mask.onnx",
)  # fmt: skip


@pytest.fixture
def folder(face_models: Path, tmp_path: Path) -> Path:
    """The faces/ folder of an engine, to tamper with."""
    return Path(shutil.copytree(face_models, tmp_path / "my engine" / "faces"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_or_damaged_file_is_named_and_the_command_is_for_this_engine(
    file: str, damage: str, folder: Path
) -> None:
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:200])
    for files in (None, FILES):
        with pytest.raises(EngineDamaged, match=file) as caught:
            FaceFinder.load(folder, files=files)
        said = str(caught.value)
        assert "python -m export.build" in said and f"--out {shlex.quote(str(folder.parent))}" in said


def test_files_that_the_manifest_does_not_list_are_not_opened(folder: Path, finder: FaceFinder) -> None:
    for stray in ("landmarks_v2.onnx", "face_parsing.onnx"):
        (folder / stray).write_bytes(b"nobody verified this")
    listed = FaceFinder.load(folder, files=FILES)
    assert isinstance(listed.landmark_model, AttentionMesh) and listed.parser is None
    assert listed.model_id == finder.model_id
    with pytest.raises(EngineDamaged, match="expected 'v2'"):
        FaceFinder.load(folder)  # the exporter's own folder: its files count
    with pytest.raises(EngineDamaged, match="onet.onnx is missing from the manifest"):
        FaceFinder.load(folder, files=set(FILES) - {"onet.onnx"})


def test_landmarks_json_of_another_model_is_refused(folder: Path) -> None:
    (folder / "landmarks.json").write_text('{"model": "v2", "size_px": 256}')
    with pytest.raises(EngineDamaged, match="about the model 'v2', expected 'attention'"):
        FaceFinder.load(folder)


def test_model_id_is_stable_and_short(face_models: Path, finder: FaceFinder) -> None:
    assert finder.model_id == FaceFinder.load(face_models).model_id
    assert finder.model_id.startswith("mtcnn+attention-") and len(finder.model_id) < 64


def test_one_finder_serves_two_threads(finder: FaceFinder, pictures: dict[str, LoadedPhoto]) -> None:
    def work(name: str) -> tuple[object, bytes, bytes]:
        face = finder.find(pictures[name])
        return face.box, face.landmarks.tobytes(), finder.crop(pictures[name], face, 96)[0].tobytes()

    expected = {name: work(name) for name in NAMES}
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(work, NAMES * 6)) == [expected[name] for name in NAMES * 6]


def test_runtime_imports_no_builder_and_no_mediapipe() -> None:
    code = (
        "import sys, realisid_trt.persons.photo, realisid_trt.persons.faces, realisid_trt.persons.conditions\n"
        "heavy = {'torch', 'onnx', 'mediapipe', 'transformers', 'tflite', 'diffusers', 'export'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
