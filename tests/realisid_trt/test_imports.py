"""The runtime is lean: what it may import, how long that takes, and that it runs where nothing else is installed."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "polygraphy", "export"}
OPTIONAL = {"mediapipe"}  # inside the one function that runs a face_landmarker.task
ALLOWED = {
    "numpy", "cv2", "PIL", "tokenizers", "safetensors", "tqdm", "onnxruntime", "cuda", "tensorrt", "tensorrt_rtx",
    "realisid_trt", "__future__",
} | set(sys.stdlib_module_names)  # fmt: skip
SOURCES = sorted([*ROOT.glob("realisid_trt/**/*.py"), *ROOT.glob("kernels/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_runtime_imports_nothing_else(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            package = name.partition(".")[0]
            assert package not in FORBIDDEN, f"line {node.lineno} imports {name}"
            assert package in ALLOWED | OPTIONAL, f"line {node.lineno} imports {name}"


def test_only_one_file_imports_the_optional() -> None:
    found = {
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.partition(".")[0] in OPTIONAL
    }
    assert found == {"mediapipe_tasks.py"}


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with `pip install .[cpu]`, and nothing else."""
    folder = tmp_path_factory.mktemp("lean")
    # A copy: pip would build in the checkout, and leave it there.
    for name in ("realisid_trt", "kernels", "export"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"{folder / 'source'}[cpu]"], check=True, cwd=folder)
    return python


def run(python: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_a_lean_environment_makes_a_picture(lean: Path, engine_dir: Path, photos: Any, tmp_path: Path) -> None:
    names = ("torch", "diffusers", "transformers", "onnx")
    absent = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    assert run(lean, tmp_path, "-c", absent).strip() == "[]"
    out = run(
        lean, tmp_path, "-m", "realisid_trt", "generate", "--engine", str(engine_dir), "--prompt", "two friends",
        "--person", f"{photos.astronaut}@4,16,60,72", "--person", f"{photos.hopper}@66,20,124,78",
        "--seed", "7", "--steps", "3", "--out", "picture.png",
    )  # fmt: skip
    assert "picture.png" in out
    from PIL import Image

    assert Image.open(tmp_path / "picture.png").size == (128, 128)


@pytest.mark.long
def test_what_ran_in_the_lean_environment_imported_nothing_else(lean: Path, engine_dir: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from realisid_trt import Engine; e = Engine.load(sys.argv[1]);"
        "e.generate('a beach', num_inference_steps=1); print(sorted({n.partition('.')[0] for n in sys.modules}))"
    )
    loaded = set(ast.literal_eval(run(lean, tmp_path, "-c", script, str(engine_dir))))
    assert not loaded & (FORBIDDEN | OPTIONAL)


@pytest.mark.long
def test_importing_is_quick(lean: Path, tmp_path: Path) -> None:
    """Our modules take at most as long as numpy, cv2 and PIL, in turns, each in a process of its own.

    Processor time is compared: on a clock, other processes that read the disk would count too. And the medians of both:
    the quickest of a few runs is one draw.
    """
    timer = "import time; s = time.process_time(); import {}; print(time.process_time() - s)"
    ours, theirs = [], []
    for _ in range(7):
        theirs.append(float(run(lean, tmp_path, "-c", timer.format("numpy, cv2, PIL.Image"))))
        ours.append(float(run(lean, tmp_path, "-c", timer.format("realisid_trt"))))
    print(f"import realisid_trt {median(ours):.3f} s, numpy + cv2 + PIL {median(theirs):.3f} s")
    assert median(ours) <= 2 * median(theirs)
