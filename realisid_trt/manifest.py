"""The engine directory: read, check, explain.

`manifest.json` lists every file with its hash, every network with its inputs and outputs, and every constant of the
model. It is checked before any other file is opened, so later code can rely on it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .config import RealisIDConfig
from .errors import EngineDamaged, EngineMismatch, EngineMissing, ShapeError
from .files import VerifiedFiles, sha256

FORMAT = 6
MANIFEST = "manifest.json"
CONSTANTS = "constants.safetensors"
FACE_ENCODER = "face_encoder"  # the folder of the face encoder


@dataclass(frozen=True)
class Axis:
    """A dynamic dimension: its name and the sizes it may take."""

    name: str
    min: int
    max: int
    multiple: int = 1

    def admits(self, size: int) -> bool:
        return self.min <= size <= self.max and size % self.multiple == 0

    def __str__(self) -> str:
        step = f" in steps of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.name} in {self.min}..{self.max}{step}"


@dataclass(frozen=True)
class Port:
    """An input or output of a network: name, dtype, and a fixed or dynamic size per dimension."""

    name: str
    dtype: str
    shape: tuple[int | Axis, ...]

    @classmethod
    def from_dict(cls, port: Mapping[str, Any]) -> Port:
        shape = tuple(
            size if isinstance(size, int) else Axis(size["axis"], size["min"], size["max"], size.get("multiple", 1))
            for size in port["shape"]
        )
        return cls(port["name"], port["dtype"], shape)

    def __str__(self) -> str:
        return "(" + ", ".join(size.name if isinstance(size, Axis) else str(size) for size in self.shape) + ")"

    def check(self, shape: tuple[int, ...], network: str) -> None:
        """Raises ShapeError if an array of this shape cannot be fed."""
        fits = len(shape) == len(self.shape) and all(
            expected.admits(size) if isinstance(expected, Axis) else expected == size
            for size, expected in zip(shape, self.shape, strict=True)
        )
        if fits:
            return
        ranges = ", ".join(str(size) for size in self.shape if isinstance(size, Axis))
        raise ShapeError(
            f"{network} input {self.name} is {shape}, expected {self}{' with ' + ranges if ranges else ''}. Split the "
            "batch or use another picture size, or rebuild with a larger --batch, --persons or --resolution."
        )


@dataclass(frozen=True)
class Network:
    """One network of a build: its file, its inputs and outputs."""

    name: str
    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ShapeError if inputs of these shapes cannot be fed; inputs not named are not checked."""
        for port in self.inputs:
            if port.name in shapes:
                port.check(shapes[port.name], self.name)

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shape of every output, for inputs of these shapes. A dynamic axis is counted in units of its
        `multiple`."""
        units = {
            axis.name: size // axis.multiple
            for port in self.inputs
            for axis, size in zip(port.shape, shapes[port.name], strict=True)
            if isinstance(axis, Axis)
        }
        return {
            port.name: tuple(size if isinstance(size, int) else units[size.name] * size.multiple for size in port.shape)
            for port in self.outputs
        }


@dataclass(frozen=True)
class Build:
    """All networks for one backend, in one precision, for one architecture. A backend opens one build.

    device:       the kind it is for, "cpu" or "cuda".
    wide:         networks that stay float32, with the reason.
    architecture: of the GPU, such as "sm_90" or, for plans that run on several, "sm_86+sm_89"; or "portable".
    gpu:          the GPU that it was built on, if the plans depend on it: name, architecture, sms, cuda.
    versions:     of the packages that its files depend on.
    """

    id: str
    backend: str
    device: str
    precision: str
    wide: Mapping[str, str]
    opset: int
    architecture: str
    gpu: Mapping[str, Any] | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Tokenizer:
    """Where a tokenizer lies and how CLIP pads."""

    file: str
    max_length: int
    pad_id: int


@dataclass(frozen=True)
class Model:
    """The checkpoint's constants for the runtime. No shape is assumed: all come from the networks.

    sample_size:       side of the UNet's training latents, and of the canvas for faces, in latent cells.
    vae_scale_factor:  f, px per latent cell.
    levels:            L, resolutions inside the UNet.
    residual_levels:   level of each skip of the UNet, the mid block last.
    pooled_dim:        width of the pooled text embedding; 0 for a model without added conditions.
    image_size, image_mean, image_std: of the ID crop; 0 and empty where ID tokens do not come from one.
    face_encoder:      the keys of face_encoder/config.json, where `id_input` is "aligned_face"; else None. Its file
                       lies in face_encoder/.
    id_encoder_key:    hash of what an identity holds: of image encoder and projection, or of the face encoder and its
                       preprocessing. Identities of another encoder are refused. None without identities.
    """

    sample_size: int
    latent_channels: int
    vae_scale_factor: int
    levels: int
    residual_levels: tuple[int, ...]
    cross_attention_dim: int
    pooled_dim: int
    tokenizers: Mapping[str, Tokenizer]
    num_id_tokens: int
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    face_encoder: Mapping[str, Any] | None
    id_encoder_key: str | None

    @classmethod
    def from_dict(cls, model: Mapping[str, Any]) -> Model:
        values = dict(model)
        values["tokenizers"] = {name: Tokenizer(**tokenizer) for name, tokenizer in model["tokenizers"].items()}
        for key in ("residual_levels", "image_mean", "image_std"):
            values[key] = tuple(model[key])
        return cls(**values)

    @property
    def default_size(self) -> int:
        """Side in px of the picture the UNet was trained on."""
        return self.sample_size * self.vae_scale_factor


class Manifest:
    """The checked `manifest.json` of an engine directory.

    Read with `Manifest.read`; then `check_files` before a file is opened. Raises EngineMissing, EngineDamaged or
    EngineMismatch with the reason and the command that rebuilds the engine.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Manifest:
        """The manifest of an engine directory: format and seal verified, files not yet."""
        folder = find_engine(Path(os.path.abspath(path)))
        advice = rebuild(path)
        try:
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EngineDamaged(f"{folder / MANIFEST} cannot be read as JSON ({error}). {advice}") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise EngineMismatch(
                f"{folder} has engine format {found!r}; this realisid_trt reads format {FORMAT}. {advice}"
            )
        computed, sealed = seal(values), values.get("seal")
        if not isinstance(sealed, dict):
            sealed = {}
        edited = [name for name, digest in computed.items() if sealed.get(name) != digest]
        edited += sorted(set(sealed) - set(computed))
        if edited:
            raise EngineDamaged(
                f"{folder / MANIFEST} was edited after the build: {', '.join(edited[:5])}"
                f"{f' and {len(edited) - 5} more' if len(edited) > 5 else ''} no longer match its seal. "
                f"An engine is what was built and verified; to change it, change the checkpoint. {advice}"
            )
        if problem := _wrong_names(values):
            raise EngineDamaged(f"{folder / MANIFEST}: {problem}. {advice}")
        return cls(folder, values)

    @cached_property
    def config(self) -> RealisIDConfig:
        return RealisIDConfig.from_dict(self.values["realisid_config"], str(self.path / MANIFEST))

    @cached_property
    def model(self) -> Model:
        return Model.from_dict(self.values["model"])

    @cached_property
    def constants(self) -> dict[str, np.ndarray[Any, Any]]:
        """`alphas_cumprod` (T,) float64, and with identities `null_id_tokens` (T, D) float32."""
        from safetensors.numpy import load_file

        return dict(load_file(self.path / CONSTANTS))

    @cached_property
    def builds(self) -> dict[str, Build]:
        """The builds, by id."""
        return {id: Build(id=id, **build) for id, build in self.values["builds"].items()}

    def build_for(self, backend: str, device: str = "cpu") -> Build:
        """The build that `backend` opens on a kind of device: the one for it, else float32, which runs on any.

        Raises EngineMissing if there is none.
        """
        found = [build for build in self.builds.values() if build.backend == backend]
        for build in [*(b for b in found if b.device == device), *(b for b in found if b.precision == "float32")]:
            return build
        built = ", ".join(dict.fromkeys(build.backend for build in self.builds.values()))
        if found:
            raise EngineMissing(f"{self.path} was built with --gpu-only, not for a {device}. {self.rebuild()}")
        raise EngineMissing(f"{self.path} was built for {built}, not for {backend}. {self.rebuild(backend)}")

    def rebuild(self, *more: str) -> str:
        """The sentence that builds this engine again, for its backends and `more`, in its precision."""
        backends = dict.fromkeys([*(build.backend for build in self.builds.values()), *more])
        precisions = {build.precision for build in self.builds.values()}
        half = " --fp16" if "float16" in precisions else " --bf16" if "bfloat16" in precisions else ""
        return f"{rebuild(self.path)}{half}{''.join(f' --backend {name}' for name in backends)}"

    def networks(self, build: Build) -> dict[str, Network]:
        """Every network of a build, by name."""
        return {
            name: Network(
                name,
                entry["file"],
                tuple(map(Port.from_dict, entry["inputs"])),
                tuple(map(Port.from_dict, entry["outputs"])),
            )
            for name, network in self.values["networks"].items()
            for entry in [network["builds"][build.id]]
        }

    def files_in(self, folder: str) -> set[str]:
        """Names of the listed files in a folder of the engine: only these may be opened."""
        prefix = f"{folder}/"
        return {name.removeprefix(prefix) for name in self.values["files"] if name.startswith(prefix)}

    def files_of(self, build: Build, networks: Collection[str] | None = None) -> list[str]:
        """The listed files that these networks of a build need (None: all of them), and the files that belong to no
        network."""
        files = list(self.values["files"])
        owned = {entry["file"] for network in self.values["networks"].values() for entry in network["builds"].values()}
        opened = self.networks(build)
        wanted = {opened[name].file for name in (opened if networks is None else networks)}
        other = owned - wanted
        return [name for name in files if not any(_belongs(name, file) for file in other)]

    def check_files(self, names: Iterable[str] | None = None) -> None:
        """Checks that these listed files (None: all) exist and are unchanged since the build. Hashes are remembered by
        path, size, mtime and inode.

        Raises EngineDamaged.
        """
        advice = rebuild(self.path)
        files = self.values["files"]
        with VerifiedFiles() as verified:
            for name in files if names is None else names:
                file, listed = self.path / name, files[name]
                try:
                    size = file.stat().st_size
                    digest = verified.sha256(file) if size == listed["bytes"] else None
                except OSError as error:
                    raise EngineDamaged(f"{file} is missing or unreadable ({error.strerror}). {advice}") from None
                if size != listed["bytes"]:
                    raise EngineDamaged(f"{file} is {size} bytes; the build wrote {listed['bytes']}. {advice}")
                if digest != listed["sha256"]:
                    raise EngineDamaged(
                        f"{file} was altered after the build: its sha256 is {str(digest)[:12]}…, the manifest "
                        f"says {listed['sha256'][:12]}…. {advice}"
                    )

    def check_again(self, network: Network) -> None:
        """Checks the files of an unloaded network. Raises EngineMismatch if another build replaced them."""
        try:
            self.check_files(name for name in self.values["files"] if _belongs(name, network.file))
        except EngineDamaged as error:
            raise EngineMismatch(
                f"{self.path} is no longer the engine that was loaded, so {network.name} cannot be loaded again. Load "
                f"the engine again: Engine.load. ({error})"
            ) from error


def _belongs(name: str, file: str) -> bool:
    """Whether a file is a network's, or the weights beside it."""
    return name == file or name.startswith(f"{file}.")


def _wrong_names(values: Mapping[str, Any]) -> str | None:
    """Why the file names in a manifest are wrong, or None. All must lie in the folder and be listed."""
    try:
        listed = values["files"]
        named = [
            CONSTANTS,
            *_face_encoder_files(values["model"]["face_encoder"]),
            *(tokenizer["file"] for tokenizer in values["model"]["tokenizers"].values()),
            *(entry["file"] for network in values["networks"].values() for entry in network["builds"].values()),
        ]
        for name in listed:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                return f"the file {name!r} does not lie in the folder"
        for name in named:
            if name not in listed:
                return f"{name!r} is used and not listed among the files"
    except (KeyError, TypeError, AttributeError) as error:
        return f"an entry is missing or is not what it should be ({type(error).__name__}: {error})"
    return None


def _face_encoder_files(described: Mapping[str, Any] | None) -> list[str]:
    return [] if described is None else [f"{FACE_ENCODER}/{described['file']}"]


def rebuild(path: str | os.PathLike[str]) -> str:
    """The sentence with the command that rebuilds an engine."""
    return f"Build it again: python -m export.build --checkpoint … --out {shlex.quote(str(path))}"


def find_engine(path: Path) -> Path:
    """The engine directory at `path`, or the previous one if a build was killed between its two renames."""
    if (path / MANIFEST).is_file():
        return path
    previous = path.with_name(path.name + ".old")
    if not path.exists() and (previous / MANIFEST).is_file():
        return previous
    if not path.is_dir():
        raise EngineMissing(
            f"{path}: no such engine directory. Build one: python -m export.build --checkpoint … --out "
            f"{shlex.quote(str(path))}"
        )
    raise EngineMissing(f"{path} holds no {MANIFEST}, so it is not an engine directory. {rebuild(path)}")


def seal(values: Mapping[str, Any]) -> dict[str, str]:
    """Digest of every section and every key of a section. A reader can then name the edited part."""
    digests = {}
    for section, content in values.items():
        if section == "seal":
            continue
        entries: Iterable[tuple[str, Any]]
        if isinstance(content, dict) and content:
            entries = ((f"{section}.{key}", value) for key, value in content.items())
        else:
            entries = [(section, content)]
        for name, value in entries:
            text = json.dumps(value, sort_keys=True, separators=(",", ":"))
            digests[name] = sha256(f"{name}={text}".encode())[:16]
    return digests
