"""Weights on their way into a checkpoint: linked, copied or converted, every number looked at."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from realisid_trt.errors import CheckpointError

from ..checkpoint.files import read_header
from ..files import check_space
from ..miniature.weights import write_weights
from .nets import STEM, Net
from .pickles import DTYPES

# Refusals of a hard link after which a copy is made: another disk, another owner, a file system without links.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
HALF = "F16"


def is_converted(net: Net, half: bool) -> bool:
    """Whether its weights are written anew, and not taken as they are."""
    return net.pickled is not None or (half and net.dtypes != {HALF})


def needed_bytes(net: Net, out: Path, half: bool, copy: bool) -> int:
    """The disk space that its weights take beside `out`: none where they can be linked."""
    if is_converted(net, half):
        return sum(map(math.prod, net.shapes.values())) * _dtype(net, half).itemsize
    return sum(file.stat().st_size for file in net.component.files if copy or not same_disk(file, out.parent))


def write_net(net: Net, folder: Path, half: bool, copy: bool) -> str:
    """config.json and the plain weight files of one net in a new folder. Returns "linked", "copied" or "converted".

    Memory: of one tensor for a link or a copy, of a shard of 1 GiB for a conversion. Raises CheckpointError for NaN,
    infinite numbers, and numbers that half precision does not have.
    """
    folder.mkdir()
    config = {**net.component.config, "_class_name": net.component.class_name}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with _reader(net) as read:
        if is_converted(net, half):
            dtype = _dtype(net, half)
            write_weights(
                folder, STEM, net.shapes, lambda key, shape: narrowed(net.request.folder, key, read(key), dtype), dtype
            )
            return "converted"
        for key in net.shapes:
            _check_finite(net.request.folder, key, read(key))
    files, weight_map, linked = net.component.files, dict[str, str](), True
    for number, file in enumerate(files, start=1):
        shard = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        name = f"{STEM}{shard}.safetensors"
        linked &= link_or_copy(file, folder / name, copy)
        weight_map.update(dict.fromkeys(read_header(file), name))
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return "linked" if linked else "copied"


def link_or_copy(file: Path, target: Path, copy: bool) -> bool:
    """A second name for a file's content, or a copy of it. Links are followed. Returns whether it is a second name."""
    real = os.path.realpath(file)
    if not copy:
        try:
            os.link(real, target)
            return True
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
    check_space(target.parent, os.stat(real).st_size, f"a copy of {file}")
    shutil.copyfile(real, target)
    return False


def same_disk(file: Path, folder: Path) -> bool:
    """Whether a file could be linked into a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return file.stat().st_dev == folder.stat().st_dev


def _dtype(net: Net, half: bool) -> torch.dtype:
    return common_dtype((dtype for dtype, name in DTYPES.items() if name in net.dtypes), half)


@contextlib.contextmanager
def _reader(net: Net) -> Iterator[Callable[[str], Tensor]]:
    """Reads tensors by name, one at a time."""
    if net.pickled is not None:
        yield net.pickled.__getitem__
        return
    with contextlib.ExitStack() as stack:
        holders = {}
        for file in net.component.files:
            with _understood(file):
                opened = stack.enter_context(safe_open(file, framework="pt"))
            holders.update(dict.fromkeys(opened.keys(), (file, opened)))

        def read(key: str) -> Tensor:
            file, opened = holders[key]
            with _understood(file):
                tensor: Tensor = opened.get_tensor(key)
            return tensor

        yield read


@contextlib.contextmanager
def _understood(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}. Copy it again.") from error


def write_tensors(
    folder: Path, stem: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], half: bool, source: Path
) -> None:
    """config.json and the weight file of a part whose tensors are read already, in a new folder.

    source: of the tensors, for the error. Raises CheckpointError as `write_net`.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    dtype = common_dtype({tensor.dtype for tensor in tensors.values()}, half)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    write_weights(folder, stem, shapes, lambda key, shape: narrowed(source, key, tensors[key], dtype), dtype)


def common_dtype(kinds: Iterable[torch.dtype], half: bool) -> torch.dtype:
    """The kind of numbers that a conversion writes: it loses nothing unless half precision is asked for."""
    return torch.float16 if half else functools.reduce(torch.promote_types, kinds)


def narrowed(source: Path, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another kind of numbers. Raises CheckpointError for numbers that are not finite there."""
    _check_finite(source, key, tensor)
    converted = tensor.to(dtype)
    if not torch.isfinite(converted).all():
        largest = float(tensor.abs().max())
        raise CheckpointError(f"{source}: {key} holds {largest:g}, and float16 ends at 65504. Leave --half out.")
    return converted


def _check_finite(source: Path, key: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{source}: {key} holds {bad} NaN or infinite of {tensor.numel()} numbers. Copy the weights "
            "again; if the original has them too, its training has failed."
        )
