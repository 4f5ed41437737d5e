"""Weights that were published as a pickle only: read without running what it contains."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realisid_trt.errors import CheckpointError

# Kinds of numbers that weights may have, and their names in safetensors.
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def find_pickle(folder: Path, stem: str, variant: str | None) -> Path | None:
    """The pickle that holds the weights, where the folder has no safetensors: the variant's, else the plain one."""
    if any(folder.glob(f"{stem}*.safetensors")) or any(folder.glob(f"{stem}.safetensors.index*.json")):
        return None
    for dotted in dict.fromkeys((f".{variant}" if variant else "", "")):
        if (file := folder / f"{stem}{dotted}.bin").is_file():
            return file
    return None


ADVICE = "Take the model's safetensors, or ask its publisher for them."


def read_pickle(file: Path, advice: str = ADVICE) -> dict[str, Tensor]:
    """Its tensors, mapped and not yet read. advice: what to do, in the error.

    Raises CheckpointError for anything but a dict of float tensors.
    """
    return tensors_of(load_pickle(file, advice), str(file), advice)


def load_pickle(file: Path, advice: str = ADVICE, *, whole: bool = False) -> Any:
    """What is in a file of torch.save, without running code that is in it. Its tensors are mapped and not yet read.

    whole: a file of torch's format before 1.6, which cannot be mapped, is taken as well and read whole.

    Raises CheckpointError.
    """
    old = whole and not zipfile.is_zipfile(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=not old)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "Unsupported" in line), "")
        raise CheckpointError(
            f"{file} holds more than tensors, so torch refuses it (weights_only): {reason or 'it may run code'}. "
            f"{advice}"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError, AttributeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if old:
            raise CheckpointError(
                f"{file} cannot be read as a file of torch.save: {said}. It is cut off, or something else. {advice}"
            ) from error
        raise CheckpointError(
            f"{file} cannot be read as torch.save's zip format without being loaded whole: {said}. It is cut off, or "
            f"older than torch 1.6. {advice}"
        ) from error


def tensors_of(values: Any, name: str, advice: str = ADVICE, more: Collection[torch.dtype] = ()) -> dict[str, Tensor]:
    """The values as tensors by name. Raises CheckpointError for anything but a dict of float tensors.

    name: of the file, or of the part of it. more: kinds of numbers that are taken as well.
    """
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{name} holds a {type(values).__name__}, expected a dict of tensors by name. {advice}")
    for key, tensor in values.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name}: {key!r} is a {type(tensor).__name__}, expected only tensors by name, as save_pretrained "
                f"writes them. {advice}"
            )
        if tensor.dtype not in (*DTYPES, *more):
            kind, kinds = str(tensor.dtype).removeprefix("torch."), ", ".join(DTYPES.values())
            raise CheckpointError(f"{name}: {key} holds numbers of the kind {kind}, expected one of {kinds}. {advice}")
        if tensor.layout != torch.strided:
            raise CheckpointError(
                f"{name}: {key} is a tensor of the layout {tensor.layout}, expected torch.strided, with every number "
                f"in it. {advice}"
            )
    return dict(values)
