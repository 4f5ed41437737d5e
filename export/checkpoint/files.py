"""The files of a checkpoint's folders: JSON, and weights with their variants and shards.

Checks read only the headers of safetensors: a header lists the file's tensors and their extents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from realisid_trt.errors import CheckpointError
from realisid_trt.files import VerifiedFiles

# Folder of the layout → first part of its weight files' names, as its library writes them.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "image_encoder": "model",
    "id_projection": "model",
    "id_patch_projection": "model",
}
BRANCH = "controlnet_"  # the part of a branch is named so, wherever its folder lies
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ID_PATCH_PICKLE = "id-patch.bin"  # both projections of ID-Patch, as they were published


def stem_of(name: str) -> str:
    """The first part of the names of a component's weight files."""
    return "diffusion_pytorch_model" if name.startswith(BRANCH) else STEMS.get(name, "model")


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns the system's refusals (rights, a failing disk) into a CheckpointError. `folder`: the checkpoint."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror or error}). Get the right to read it "
            f"(chmod -R u+rX {folder}), or copy it again."
        ) from error


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """The object in a JSON file. `purpose` says in the error what the file is for. Raises CheckpointError, OSError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {purpose}. Copy it from where the checkpoint comes from.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Copy or correct the file.") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise CheckpointError(f"{path} holds a {kind}, expected a JSON object. Copy or correct the file.")
    return values


def refuse(where: str, key: str, value: object, expected: str, advice: str = "Correct the file.") -> CheckpointError:
    """The error for one key of one config."""
    return CheckpointError(f"{where}/config.json: {key} is {value!r}, expected {expected}. {advice}")


def find_weights(folder: Path, stem: str, variant: str | None) -> tuple[tuple[Path, ...], str | None]:
    """The weight files of a component, and their variant: the requested one, else None, as in diffusers.

    Raises CheckpointError when there are only pickles, only other variants, nothing, a missing shard, a file that is
    cut off, or both a single file and an index (libraries disagree about which one counts).
    """
    for wanted in dict.fromkeys((variant, None)):
        single, index = _names(folder, stem, wanted)
        if single.is_file() and index.is_file():
            raise CheckpointError(
                f"{folder} holds both {single.name} and {index.name}, expected one of them: only one can count. "
                "Remove the one that is out of date."
            )
        if single.is_file():
            read_header(single)
            return (single,), wanted
        if index.is_file():
            return _shards(index), wanted
    pickles = sorted(
        (file.name for file in folder.iterdir() if file.suffix in PICKLES),
        key=lambda name: (name != ID_PATCH_PICKLE, name),
    )
    others = sorted(file.name for file in folder.glob(f"{stem}.*safetensors*"))
    expected = f"expected {stem}.safetensors or {stem}.safetensors.index.json with its shards"
    if pickles:
        raise CheckpointError(
            f"{folder} holds {', '.join(pickles[:3])} and no safetensors, {expected}. Pickles are refused, since "
            "loading one runs what it contains. Convert it once, if you trust its source: "
            f"{conversion(folder, pickles[0], stem)}"
        )
    if others:
        named = others[0].removeprefix(f"{stem}.").removeprefix("safetensors.index.").split(".")[0].split("-")[0]
        raise CheckpointError(
            f"{folder} holds {', '.join(others[:3])}, {expected}"
            f'{f" or their variant {variant}" if variant else ""}. Ask for what is there: variant="{named}".'
        )
    raise CheckpointError(f"{folder} holds no weights, {expected}. Copy them from where the checkpoint comes from.")


def conversion(folder: Path, pickle: str, stem: str) -> str:
    """The command that turns a pickle into safetensors without running code that is in it (weights_only)."""
    if pickle == ID_PATCH_PICKLE:
        return (
            "python -m export.adopt idpatch --weights FOLDER --base SDXL --face-encoder FILE --out CKPT, where FOLDER "
            f"holds {pickle}."
        )
    return (
        f'cd {folder} && python -c "import torch, safetensors.torch as s; '
        f"w = torch.load('{pickle}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in w.items()}}, '{stem}.safetensors', {{'format': 'pt'}})\""
    )


def _names(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    dotted = f".{variant}" if variant else ""
    return folder / f"{stem}{dotted}.safetensors", folder / f"{stem}.safetensors.index{dotted}.json"


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index, "it says which shard holds which tensor").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, expected tensor names with their shards. Copy it again.")
    names = sorted({str(name) for name in weight_map.values()})
    files = tuple(index.parent / name for name in names)
    missing = [file.name for file in files if file.name not in names or not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(names)} shards, of which {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Copy the shards beside the index."
        )
    surplus = [f"{key} ({name})" for file in files for key, name in _misplaced(file, weight_map)]
    if surplus:
        raise CheckpointError(
            f"{index} and its shards disagree about {len(surplus)} tensors: {', '.join(surplus[:3])}. Copy all of them "
            "again, from the same place."
        )
    return files


def _misplaced(file: Path, weight_map: dict[str, str]) -> list[tuple[str, str]]:
    """(tensor, file) of every tensor that only the shard or only the index lists."""
    inside = set(read_header(file))
    promised = {key for key, name in weight_map.items() if name == file.name}
    return [(key, file.name) for key in sorted(inside ^ promised)]


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name → (dtype, shape) of a safetensors file, from its header alone.

    Format: 8 bytes little-endian length n, n bytes of JSON, then the data (safetensors' README).
    Raises CheckpointError for a file that is cut off, is a git-lfs pointer, or is something else.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{file} is a git-lfs pointer, expected the weights it stands for. Run `git lfs pull` in the folder "
                "you cloned."
            )
        length = int.from_bytes(start, "little")
        try:
            if length > min(size, 100 * 2**20):
                raise ValueError("its length field is impossible")
            header = json.loads(stream.read(length))
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            end = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
            entries = {key: (value["dtype"], tuple(value["shape"])) for key, value in tensors.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{file} is not a safetensors file: {error}. Copy it again, or convert it with safetensors' save_file."
            ) from error
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes, expected {end}: it was cut off or altered. Copy it again.")
    return entries


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of the files, as stored. Raises CheckpointError."""
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except (OSError, SafetensorError, ValueError, KeyError) as error:  # KeyError: a type that torch does not have
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}. Copy it again.") from error
    return weights


def component_key(config: Any, files: Iterable[Path]) -> str:
    """sha256 over a config and the contents of files, on which an export of the component depends.

    Version stamps and paths that libraries write into a config do not count. Raises OSError.
    """
    kept = {k: v for k, v in config.items() if k not in ("_diffusers_version", "transformers_version", "_name_or_path")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in files:
        stat = file.stat()
        digest.update(_sha256(file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino).encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _sha256(file: Path, *stat: int) -> str:
    """sha256 of a file, remembered between processes.

    It is remembered in this process too. Otherwise, if the cache file cannot be written (a read-only home), a build
    would read a UNet once for each of its networks.
    """
    with VerifiedFiles() as verified:
        return verified.sha256(file)
