"""The wheel that pip installs: the runtime, the export, and one command that no folder of the user's can shadow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow("wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("realisid_trt", "kernels", "export", "training"):  # a copy: pip would leave its build in the checkout
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    line = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(line, check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parent / "installed"
    line = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(line, check=True, capture_output=True)
    return target


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder, which has folders of the same names."""
    for name in ("export", "training", "kernels", "realisid_trt", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('the {name} of the user')")
    return tmp_path


def run(installed: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    line = [str(installed / "bin" / "realisid"), *map(str, arguments)]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [points] = (name for name in names if name.endswith("entry_points.txt"))
        assert "realisid = export.realisid:script" in archive.read(points).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"realisid_trt", "export"}
    assert {"realisid_trt/kernels/kernels.cu", "realisid_trt/py.typed", "export/miniature/tokenizer.py"} <= set(names)
    sources = [path for folder in ("realisid_trt", "export") for path in (ROOT / folder).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= set(names)  # every room is listed in setup.py


def test_the_commands(installed: Path, elsewhere: Path, engine_dir: Path, photos: Any) -> None:
    out = elsewhere / "out.png"
    done = run(
        installed, elsewhere, "generate", "--engine", engine_dir, "--prompt", "a portrait", "--person", photos.hopper,
        "--steps", 1, "--out", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.is_file() and json.loads(done.stdout.splitlines()[-1])["persons"]
    done = run(installed, elsewhere, "--help")
    assert done.returncode == 0 and "doctor" in done.stdout
    assert "build (python -m export.build), adopt (python -m export.adopt)" in done.stdout
    done = run(installed, elsewhere, "inspect", elsewhere / "nothing")
    assert done.returncode == 1 and "error: " in done.stderr


def test_a_build(installed: Path, elsewhere: Path, checkpoint_dir: Path) -> None:
    """Its workers are processes of their own, which find the same modules."""
    out = elsewhere / "engine"
    only = "--only", "unet_time", "id_encoder"
    done = run(
        installed, elsewhere, "build", "--checkpoint", checkpoint_dir, "--out", out, "--backend", "onnxruntime", *only
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / ".engine.build").exists() or any(elsewhere.glob(".engine*"))
    done = run(installed, elsewhere, "build", "--out", out)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and "error: " in done.stderr
