"""Makes the pictures of a table, each once. A file is named by the hash of everything that determines its pictures."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import realisid_trt
import realisid_trt.kernels
from export.checkpoint import Checkpoint
from export.files import disk_errors
from realisid_trt.errors import RequestError
from realisid_trt.files import sha256, whole_or_not
from realisid_trt.loop.samplers import NoiseSchedule
from realisid_trt.manifest import Manifest

from ..result import ORIGIN, origin_of
from ..stages.branches import BranchesStage
from .cases import Case, Casting
from .contenders import Contender, EngineContender, SomebodyElse, Truth, load_engine
from .experiments import STEPS, Row
from .sampler import TorchSampler

Rgb = NDArray[np.uint8]
SHARD = 100  # pictures in a file; a stopped run loses at most as many
NO_DESIGN = ("engine", "truth", "ceiling", "floor", "torch")
MAY_DIFFER = {"stage", "save_steps", "accumulate", "written"}  # settings in which two compared trainings may differ
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The command's arguments. runs: where the trainings are; cache: pictures already made."""

    engine: Path
    checkpoint: Checkpoint
    backend: str = "auto"
    device: str | None = None
    steps: int = STEPS
    batch: int = 4
    runs: Path
    cache: Path


class PictureCache:
    """Makes and keeps pictures.

    made: how the pictures are made, as JSON values: steps and guidance where a row does not say otherwise, backend,
          device, precision, training, versions.
    """

    def __init__(self, options: EvaluationOptions, casting: Casting) -> None:
        """Raises RequestError if the engine is not the checkpoint's, and the errors of `Engine.load`."""
        self.options, self.casting, self.checkpoint = options, casting, options.checkpoint
        _check_same(options.engine, self.checkpoint)
        with load_engine(options.engine, options.backend, options.device, {}) as engine:
            ran = {name: getattr(engine.backend, name) for name in ("name", "device", "precision")}
        self.on_gpu = str(ran["device"]).startswith("cuda")
        self.torch_device = torch.device("cuda" if self.on_gpu and torch.cuda.is_available() else "cpu")
        config, full = self.checkpoint.config, self._origin()
        self.made: dict[str, Any] = {
            "steps": options.steps,
            "guidance_scale": config.guidance_scale,
            "id_guidance_scale": config.id_guidance_scale,
            "subject_conditioning_ratio": config.subject_conditioning_ratio,
            "backend": ran,
            "training": None if full is None else {key: full[key] for key in ("steps", "batch_size", "seed", "new")},
            "weights": {name: self.checkpoint.weights_key(name)[:16] for name in self.checkpoint.components},
            "versions": {
                package.metadata["Name"]: package.version
                for name in PACKAGES
                for package in importlib.metadata.distributions(name=name)
            },
        }

    def cannot(self, row: Row) -> str:
        """Why a row's pictures cannot or should not be made here; empty if they can."""
        if row.device is not None and not self.on_gpu:
            return "no GPU runs the engine, so the full model is in float32 already"
        if row.maker in NO_DESIGN:
            return ""
        weights = self._weights(row.maker)
        full, these = self._origin(), origin_of(weights.parents[1], {row.maker: weights})
        if not weights.is_file():
            return f"{weights} is missing"
        for what, origin in (("these", these), ("the full model's", full)):
            if origin is None:
                return f"no run in {self.options.runs} says that it made {what} weights"
        assert full is not None and these is not None
        if other := sorted(key for key in {*full, *these} - MAY_DIFFER if full.get(key) != these.get(key)):
            return f"it was trained otherwise than the full model ({', '.join(other)})"
        bases = {
            name: self.checkpoint.weights_key(name) for name in these["weights"] if name in self.checkpoint.components
        }
        if other := sorted(name for name, key in bases.items() if these["weights"][name] != key):
            return f"it was trained on another {', '.join(other)}"
        return ""

    def pictures(self, cases: Sequence[Case], row: Row, name: str) -> Rgb:
        """(N, S, S, 3) uint8, one per case."""
        decides = self._decides(row)
        shards = [cases[first : first + SHARD] for first in range(0, len(cases), SHARD)]
        paths = [self._path(decides, shard) for shard in shards]
        made = [_kept(path) for path in paths]
        if any(one is None for one in made):
            with self._contender(row) as contender:
                for number, (path, shard) in enumerate(zip(paths, shards, strict=True)):
                    if made[number] is None:
                        made[number] = pictures = contender.make(shard, f"{name} {number + 1}/{len(shards)}")
                        with disk_errors(path.parent), whole_or_not(path) as partial, partial.open("wb") as file:
                            np.save(file, pictures)
        return np.concatenate([one for one in made if one is not None])

    def _decides(self, row: Row) -> dict[str, Any]:
        """Everything besides the cases that a row's pictures depend on."""
        said: dict[str, Any] = {"maker": row.maker, "options": dict(row.options)}
        if row.maker in ("truth", "floor"):
            return said
        said |= {"weights": self.made["weights"], "versions": self.made["versions"], "code": _code(row.maker)}
        if row.maker == "ceiling":
            return said
        said |= {"steps": row.steps or self.made["steps"], "config": {**self.checkpoint.config.to_dict(), **row.config}}
        said["scheduler"], said["sampler"] = dict(self.checkpoint.scheduler_config), row.sampler
        if row.maker == "engine":
            said["engine"] = sha256((self.options.engine / "manifest.json").read_bytes())
            said["on"], said["device"] = self.made["backend"], row.device
        else:
            said["on"] = str(self.torch_device)
            if row.maker not in NO_DESIGN:
                said["design"] = sha256(self._weights(row.maker).read_bytes())
        return said

    def _path(self, decides: Mapping[str, Any], cases: Sequence[Case]) -> Path:
        said = json.dumps([decides, [_digest(case) for case in cases]], sort_keys=True, default=str)
        return self.options.cache / f"{sha256(said.encode())[:24]}.npy"

    @contextmanager
    def _contender(self, row: Row) -> Iterator[Contender]:
        if row.maker == "truth":
            yield Truth()
        elif row.maker == "floor":
            yield SomebodyElse(self.casting)
        elif row.maker == "ceiling":
            yield Truth(self.checkpoint)
        elif row.maker == "engine":
            device = row.device or self.options.device
            with load_engine(self.options.engine, self.options.backend, device, row.config) as engine:
                steps = row.steps or self.made["steps"]
                yield EngineContender(engine, steps, self.options.batch, row.options, row.sampler)
        else:
            steps = row.steps or self.made["steps"]
            options = {"steps": steps, "sampler": row.sampler, "device": self.torch_device, **row.options}
            if row.maker == "torch":
                yield TorchSampler(self.checkpoint, **options)
            else:
                yield TorchSampler.of_run(self.checkpoint, self._weights(row.maker), **options)

    def _origin(self) -> dict[str, Any] | None:
        """The settings of the run that trained the checkpoint's branches; None if no run that lies here did."""
        parts = {name: self.checkpoint.components[name].files for name in BranchesStage.writes}
        if any(len(files) != 1 for files in parts.values()):
            return None
        weights = {name: files[0] for name, files in parts.items()}
        found = (origin_of(path.parent, weights) for path in sorted(self.options.runs.glob(f"*/{ORIGIN}")))
        return next((origin for origin in found if origin is not None), None)

    def _weights(self, design: str) -> Path:
        return self.options.runs / f"branches-{design}" / "weights" / f"{design}.safetensors"


def _check_same(engine: Path, checkpoint: Checkpoint) -> None:
    """Raises RequestError if the engine was built from other weights, another config or another schedule."""
    manifest = Manifest.read(engine)
    built, config = manifest.values["checkpoint"], manifest.values["realisid_config"]
    other = [name for name in checkpoint.components if built.get(name) != checkpoint.weights_key(name)]
    ours = checkpoint.config.resolved().to_dict()
    other += [key for key in {*ours, *config} if ours.get(key) != config.get(key)]
    schedules = checkpoint.noise_schedule, NoiseSchedule.of(manifest)
    first, second = map(dataclasses.asdict, schedules)
    if any(not np.array_equal(value, second[name]) for name, value in first.items()):
        other.append("scheduler")
    if other:
        raise RequestError(
            f"{engine} was built from another checkpoint than {checkpoint.path}: {', '.join(sorted(other))}. Build it "
            f"again: python -m export.build --checkpoint {checkpoint.path} --out {engine}."
        )


def _kept(path: Path) -> Rgb | None:
    try:
        return np.asarray(np.load(path))
    except (OSError, ValueError, EOFError):  # not made yet, or not whole: it is made again
        return None


def _code(maker: str) -> str:
    """sha256 of the sources that make the pictures."""
    here, runtime = Path(__file__).parent, Path(str(realisid_trt.__file__)).parent
    files = [*runtime.glob("*.py"), *runtime.glob("*/*.py"), here / "contenders.py"]
    files += Path(str(realisid_trt.kernels.__file__)).parent.glob("*.py")
    if maker != "engine":
        files += [here / "sampler.py", here.parent / "residuals.py", here.parent / "text.py"]
    return sha256(*(file.read_bytes() for file in sorted(files)))


def _digest(case: Case) -> str:
    """The hash of everything that a picture depends on, and of the truth that it is compared with."""
    arrays = (case.picture.rgb, case.picture.landmarks, case.picture.boxes, *case.crops)
    said = f"{case.seed} {case.identities} {case.scene.caption}".encode()
    return sha256(said + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
