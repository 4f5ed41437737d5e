"""The makers of a kit's items: the key of each, and its files."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from export.building.origins import recall
from export.building.staging import content_key
from export.wheels import ASTRONAUT, ASTRONAUT_SHA256, HOPPER, HOPPER_SHA256, demo_photos
from realisid_trt.errors import BuildError, RequestError
from realisid_trt.files import VerifiedFiles, sha256
from realisid_trt.kernels import compile as nvrtc
from realisid_trt.manifest import Manifest

from .index import File, Item
from .plan import Plan
from .store import Store
from .weightless import ROOT, TensorIndex, source_of_checkpoint, take_out
from .wheels import WHEELS, download

FORMAT = 1  # of the stored files of items; with another number all items are made again
MAX_REST = 0.5  # the most of a folder that may be left without its weights; of the miniature's engine a third is left
PHOTOS = {  # name by demo_photos: name in the cache
    "astronaut.png": f"{ASTRONAUT_SHA256[:16]}-{Path(ASTRONAUT).name}",
    "hopper.jpg": f"{HOPPER_SHA256[:16]}-{Path(HOPPER).name}",
}
Report = Callable[[str], None]


class ItemMaker:
    """Makes items in a store."""

    def __init__(self, plan: Plan, store: Store, report: Report) -> None:
        self.plan, self.store, self.report = plan, store, report

    def make(self, name: str) -> bool:
        """Makes an item, unless it is up to date. Returns whether it was made.

        Raises BuildError, RequestError, DiskError.
        """
        key, files = MAKERS[name](self)
        key = content_key(FORMAT, name, key)
        if self.store.stands(name, key):
            return False
        self.store.record(name, Item(key, tuple(files())))
        return True

    def cubins(self) -> Draft:
        architecture = self.plan.architecture

        def files() -> list[File]:
            with tempfile.TemporaryDirectory() as folder:
                names = nvrtc.compile_elsewhere(Path(folder), [architecture])
                return [self.store.add_file(Path(folder) / name, name) for name in names]

        return f"{nvrtc.key()} {architecture}", files

    def photos(self) -> Draft:
        """The demo photographs, as `export.wheels` caches them: the far machine need not download them."""

        def files() -> list[File]:
            with tempfile.TemporaryDirectory() as folder:
                return [self.store.add_file(path, PHOTOS[path.name]) for path in demo_photos(Path(folder))]

        return " ".join(PHOTOS.values()), files

    def wheels(self, name: str) -> Draft:
        def files() -> list[File]:
            with tempfile.TemporaryDirectory() as folder:
                return [
                    self.store.add_file(wheel, wheel.name) for wheel in download(name, self.plan.python, Path(folder))
                ]

        return f"{WHEELS[name]} {self.plan.python}", files

    def miniature(self) -> Draft:
        self._build(self.plan.engine, "--fp16")
        return self._engine(self.plan.engine)

    def sdxl_checkpoint(self) -> Draft:
        folder = self._full_size_checkpoint()
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        with VerifiedFiles() as verified:
            hashes = {name: verified.sha256(folder / name) for name in names}
        return content_key(hashes), lambda: self._without_weights(folder, names, folder)

    def sdxl(self) -> Draft:
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
        """Builds an engine for ONNX Runtime alone: plans are too large to copy. An existing engine is used as it is."""
        if not (engine / "manifest.json").is_file():
            self._run("export.build", "--out", str(engine.absolute()), "--backend", "onnxruntime", *options)

    def _engine(self, engine: Path) -> Draft:
        manifest = Manifest.read(engine)
        manifest.check_files()
        backends = sorted({build.backend for build in manifest.builds.values()})
        if backends != ["onnxruntime"]:
            raise RequestError(
                f"{engine} was built for {', '.join(backends)}; plans are too large to copy. Name another --engine, "
                "which is built for ONNX Runtime alone."
            )
        if (precision := manifest.build_for("onnxruntime", "cuda").precision) != "float16":
            raise RequestError(
                f"{engine} has {precision} networks for a GPU, and measurements there are of float16. Name another "
                "--engine, which is built with --fp16."
            )
        if "path" not in (origin := recall(manifest.values)):
            raise RequestError(
                f"the path of the checkpoint of {engine} is not known on this machine, and the kit leaves weights out. "
                "Build the engine again here, or name another --engine."
            )
        checkpoint = Path(str(origin["path"]))
        names = ["manifest.json", *manifest.values["files"]]
        key = sha256(json.dumps(manifest.values["seal"], sort_keys=True).encode())
        return key, lambda: self._without_weights(engine, names, checkpoint)

    def _without_weights(self, folder: Path, names: Sequence[str], checkpoint: Path) -> list[File]:
        """These files of a folder, without the checkpoint's weights; with them, if no other machine can make them.

        Raises BuildError if the folder's weights are not the checkpoint's.
        """
        source = source_of_checkpoint(checkpoint)
        if source is None:
            return [self.store.add_file(folder / name, name) for name in names]
        tensors, files, whole_bytes, rest_bytes = TensorIndex(checkpoint), list[File](), 0, 0
        with VerifiedFiles() as verified:
            for name in names:
                path = folder / name
                rest, gaps = take_out(path, tensors)
                nbytes = path.stat().st_size
                whole_bytes, rest_bytes = whole_bytes + nbytes, rest_bytes + len(rest)
                described = {"source": source.description, "gaps": [list(gap) for gap in gaps]}
                stored = self.store.add_blob(json.dumps(described).encode()) if gaps else None
                files.append(File(name, nbytes, verified.sha256(path), self.store.add_blob(rest), stored))
        if rest_bytes > MAX_REST * whole_bytes:
            raise BuildError(
                f"{rest_bytes / 1e6:.0f} of {whole_bytes / 1e6:.0f} MB of {folder} are not weights of {checkpoint}: it "
                f"was built from other weights. Remove {folder} and run the same command again, which builds it anew."
            )
        return files

    def _run(self, module: str, *arguments: str) -> None:
        """A command of this project, shown. Raises BuildError if it fails."""
        self.report(shlex.join(["python", "-m", module, *arguments]))
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=sys.stderr)
        if done.returncode:
            raise BuildError(f"python -m {module} failed, and the kit needs its result. Its output is above.")


Draft = tuple[str, Callable[[], list[File]]]  # the key of an item, and the function that makes its files
MAKERS: dict[str, Callable[[ItemMaker], Draft]] = {
    "cubins": ItemMaker.cubins,
    "cuda-python": lambda maker: maker.wheels("cuda-python"),
    "photos": ItemMaker.photos,
    "miniature": ItemMaker.miniature,
    "diffusers": lambda maker: maker.wheels("diffusers"),
    "sdxl": ItemMaker.sdxl,
    "sdxl-checkpoint": ItemMaker.sdxl_checkpoint,
    "onnxruntime-gpu": lambda maker: maker.wheels("onnxruntime-gpu"),
}
