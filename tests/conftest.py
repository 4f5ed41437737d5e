"""Checkpoints and engines of the tests: real classes, random weights, built once and kept while they are fresh."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
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

from export.building.origins import remember
from export.files import write_json
from export.wheels import demo_photos
from realisid_trt.errors import RealisIDError
from realisid_trt.manifest import Manifest
from tests.lanes import asked_lane, commit_number, in_lane

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the model hub
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stop everything else on two cores

torch.set_num_threads(1)  # the miniature's layers are too small to share

LANE, SEED = pytest.StashKey[int | None](), pytest.StashKey[int]()
ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / "engines"  # git-ignored; a rebuilt engine takes only what is stale
PASSING = shutil.ignore_patterns(".*")  # files that another process writes beside a graph, and soon removes

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lane", default="all", metavar="K", help="of the slow tests: 0 to 5, commit, or all (default)")
    parser.addoption("--seed", type=int, metavar="N", help="of random cases; without it, the commit's")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LANE] = asked_lane(config.getoption("--lane"))
    config.stash[SEED] = commit_number() if config.getoption("--seed") is None else config.getoption("--seed")


def pytest_report_header(config: pytest.Config) -> str:
    lane = config.stash[LANE]
    slow = "all slow tests" if lane is None else f"slow tests of lane {lane}, again by --lane {lane}"
    return f"{slow}; random cases of --seed {config.stash[SEED]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not in_lane(item, config.stash[LANE])]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=lambda item: next((n for n, part in enumerate(LONG) if part in item.path.parts), len(LONG)))


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The seed of random cases, another for every commit. It is printed on top, and --seed repeats it."""
    return pytestconfig.stash[SEED]


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
def by_turns() -> Iterator[None]:
    """One process of `pytest --numprocesses` at a time: the first builds the engines, the others find them."""
    ENGINES.mkdir(exist_ok=True)
    with open(ENGINES / ".tests.lock", "w") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def built() -> dict[str, Built]:
    """Both engines, built side by side by the command a user would give, unless they are fresh.

    On a machine that cannot build: REALISID_TRT_TEST_ENGINE, one that was built elsewhere from the trained miniature.
    """
    if given := os.environ.get("REALISID_TRT_TEST_ENGINE"):
        return {"x4": Built(ROOT / "checkpoints" / "miniature", Path(given))}
    engines = {name: Built(ENGINES / f"test-{name}-checkpoint", ENGINES / f"test-{name}") for name in CHECKPOINTS}
    if "STAND_IN_KERNELS" not in os.environ:  # in a rehearsal, the process that began it has built them
        with by_turns():
            stamp = ENGINES / ".tests.json"
            if not _fresh(stamp, engines):
                stamp.unlink(missing_ok=True)
                _build(engines)
                write_json(stamp, stamp_of(engines))
            for found in engines.values():  # a test that built from a copy has left the path of that copy
                manifest = Manifest.read(found.engine).values
                remember(manifest, checkpoint=found.checkpoint, base_model=None, variant=None)
    return engines


def _fresh(stamp: Path, engines: dict[str, Built]) -> bool:
    """Whether the engines are those that the stamp describes, file by file."""
    try:
        if json.loads(stamp.read_text(encoding="utf-8")) != stamp_of(engines):
            return False
        for found in engines.values():
            Manifest.read(found.engine).check_files()
    except (OSError, ValueError, RealisIDError):
        return False
    return True


def stamp_of(engines: dict[str, Built]) -> dict[str, Any]:
    """The inputs of the engines (sources, installed packages, options), and the manifests that came out."""
    sources = hashlib.sha256()
    for path in sorted(path for folder in ("export", "kernels", "realisid_trt") for path in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            sources.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    manifests = {name: found.engine / "manifest.json" for name, found in engines.items()}
    return {
        "sources": sources.hexdigest(),
        "packages": sorted({f"{found.name} {found.version}" for found in importlib.metadata.distributions()}),
        "options": [CHECKPOINTS, BUILT_FOR],
        "engines": {name: path.read_text(encoding="utf-8") for name, path in manifests.items() if path.is_file()},
    }


def _build(engines: dict[str, Built]) -> None:
    from export.miniature import make_checkpoint

    maker, processes = hashlib.sha256(), {}
    for path in sorted((ROOT / "export" / "miniature").glob("*.py")):
        maker.update(path.read_bytes())
    for name, found in engines.items():
        options, checkpoint = CHECKPOINTS[name], found.checkpoint
        stamp, made_of = checkpoint / ".options.json", {"options": options, "maker": maker.hexdigest()}
        if not stamp.is_file() or json.loads(stamp.read_text()) != made_of:
            shutil.rmtree(checkpoint, ignore_errors=True)
            make_checkpoint(checkpoint, **options)
            stamp.write_text(json.dumps(made_of))
        command = [sys.executable, "-m", "export.build", "--checkpoint", str(checkpoint), "--out", str(found.engine)]
        processes[name] = subprocess.Popen(
            [*command, "--jobs", "1", *BUILT_FOR[name]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, f"the build of {name} failed:\n{outputs[name]}"


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
    """A copy of the engine directory that the test may change."""
    return Path(shutil.copytree(engine_dir, tmp_path / "engine", ignore=PASSING))


@pytest.fixture(scope="session")
def with_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """with_config(engine_dir, scheduler={…}, **realisid_config): the same networks under another configuration.

    It writes the same as a build of the changed checkpoint (test_build.py checks that), without the wait.
    """
    from realisid_trt.manifest import MANIFEST, seal

    def derive(engine: Path, scheduler: dict[str, Any] | None = None, **config: Any) -> Path:
        target = tmp_path_factory.mktemp("derived") / "engine"
        shutil.copytree(engine, target, copy_function=os.link, ignore=PASSING)
        manifest = json.loads((target / MANIFEST).read_text())
        if pooled := config.pop("branch_pooled_text", None):
            for row in manifest["realisid_config"]["branches"][:2]:  # RealisID's two
                row["pooled"] = pooled
        manifest["realisid_config"] |= config
        manifest["scheduler"] |= scheduler or {}
        manifest["seal"] = seal(manifest)
        (target / MANIFEST).unlink()  # a link to the original
        (target / MANIFEST).write_text(json.dumps(manifest))
        return target

    return derive
