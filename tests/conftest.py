"""Checkpoints and engines of the tests: real classes, random weights, built once and kept while they are fresh."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from export.wheels import demo_photos

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the model hub
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stop everything else on two cores

torch.set_num_threads(1)  # the miniature's layers are too small to share

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / "engines"  # git-ignored; a rebuilt engine takes only what is stale

# name → how its checkpoint is made. x4: the miniature, built for GPUs too. x8: another VAE, prediction, projection and
# null ID.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "x4": {"seed": 0},
    "x8": {"seed": 1, "vae_factor": 8, "prediction": "v_prediction", "id_tokens": 77, "null_id": "file"},
}


# tensorrt-rtx builds its plans without a GPU; the architectures are those of consumer cards.
BUILT_FOR = {
    "x4": ["--fp16"],
    "x8": ["--backend", "onnxruntime"],
}


class Photos(NamedTuple):
    """astronaut.png (512×512) and hopper.jpg (512×600), one upright face each."""

    astronaut: Path
    hopper: Path


LONG = ("test_readme.py", "test_recipe.py", "training")  # first, so that no process waits for another in the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, part in enumerate(LONG) if part in item.path.parts), len(LONG)))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    return Photos(*demo_photos(tmp_path_factory.mktemp("photos")))


@pytest.fixture(scope="session")
def face_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine's faces/ folder: MTCNN, attention mesh, person mask."""
    from export.face_models import fetch_face_models  # needs tflite, which a machine that only runs engines lacks

    folder = tmp_path_factory.mktemp("faces")
    fetch_face_models(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Built:
    """A checkpoint and the engine that was built from it."""

    checkpoint: Path
    engine: Path


@contextlib.contextmanager
def _by_turns() -> Iterator[None]:
    """One process of `pytest --numprocesses` at a time: the first builds, the others find."""
    ENGINES.mkdir(exist_ok=True)
    with open(ENGINES / ".tests.lock", "w") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def built() -> dict[str, Built]:
    """Both engines, built side by side by the command a user would give.

    On a machine that cannot build: REALISID_TRT_TEST_ENGINE, one that was built elsewhere from the trained miniature.
    """
    if given := os.environ.get("REALISID_TRT_TEST_ENGINE"):
        return {"x4": Built(ROOT / "checkpoints" / "miniature", Path(given))}
    with _by_turns():
        return _build()


def _build() -> dict[str, Built]:
    from export.miniature import make_checkpoint

    found, processes = {}, {}
    for name, options in CHECKPOINTS.items():
        checkpoint, engine = ENGINES / f"test-{name}-checkpoint", ENGINES / f"test-{name}"
        stamp = checkpoint / ".options.json"
        if not stamp.is_file() or json.loads(stamp.read_text()) != options:
            shutil.rmtree(checkpoint, ignore_errors=True)
            make_checkpoint(checkpoint, **options)
            stamp.write_text(json.dumps(options))
        command = [
            sys.executable,
            "-m",
            "export.build",
            "--checkpoint",
            str(checkpoint),
            "--out",
            str(engine),
            "--jobs",
            "1",
            *BUILT_FOR[name],
        ]
        found[name] = Built(checkpoint, engine)
        if "STAND_IN_KERNELS" in os.environ:  # a rehearsal: whoever began it has built them
            continue
        processes[name] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
    for name, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0, f"the build of {name} failed:\n{output}"
    return found


@pytest.fixture(scope="session")
def engine_dir(built: dict[str, Built]) -> Path:
    return built["x4"].engine


@pytest.fixture(scope="session")
def checkpoint_dir(built: dict[str, Built]) -> Path:
    return built["x4"].checkpoint


@pytest.fixture(scope="session")
def engine(engine_dir: Path) -> Any:
    from realisid_trt import Engine

    return Engine.load(engine_dir)


@pytest.fixture
def engine_copy(engine_dir: Path, tmp_path: Path) -> Path:
    """An engine directory of one's own, to tamper with."""
    return Path(shutil.copytree(engine_dir, tmp_path / "engine"))


@pytest.fixture(scope="session")
def with_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """with_config(engine_dir, scheduler={…}, **realisid_config): the same networks under another configuration.

    What it writes equals what a build of the changed checkpoint writes (test_build.py says so), without the wait.
    """
    from realisid_trt.manifest import MANIFEST, seal

    def derive(engine: Path, scheduler: dict[str, Any] | None = None, **config: Any) -> Path:
        target = tmp_path_factory.mktemp("derived") / "engine"
        shutil.copytree(engine, target, copy_function=os.link)
        manifest = json.loads((target / MANIFEST).read_text())
        manifest["realisid_config"] |= config
        manifest["scheduler"] |= scheduler or {}
        manifest["seal"] = seal(manifest)
        (target / MANIFEST).unlink()  # a link to the original
        (target / MANIFEST).write_text(json.dumps(manifest))
        return target

    return derive
