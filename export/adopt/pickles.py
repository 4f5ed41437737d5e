"""Weights that were published as a pickle only: read without running what it contains."""

from __future__ import annotations

import pickle
from pathlib import Path

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


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Its tensors, mapped and not yet read. Raises CheckpointError for anything but a dict of float tensors."""
    advice = "Take the model's safetensors, or ask its publisher for them."
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "Unsupported" in line), "")
        raise CheckpointError(
            f"{file} holds more than tensors, so torch refuses it (weights_only): {reason or 'it may run code'}. "
            f"{advice}"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError, AttributeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file} cannot be read as torch.save's zip format without being loaded whole: {said}. It is cut off, or "
            f"older than torch 1.6. {advice}"
        ) from error
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{file} holds a {type(values).__name__}, expected a dict of tensors by name. {advice}")
    for key, tensor in values.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file}: {key!r} is a {type(tensor).__name__}, expected only tensors by name, as save_pretrained "
                f"writes them. {advice}"
            )
        if tensor.dtype not in DTYPES:
            kind, kinds = str(tensor.dtype).removeprefix("torch."), ", ".join(DTYPES.values())
            raise CheckpointError(f"{file}: {key} holds numbers of the kind {kind}, expected one of {kinds}. {advice}")
        if tensor.layout != torch.strided:
            raise CheckpointError(
                f"{file}: {key} is a tensor of the layout {tensor.layout}, expected torch.strided, with every number "
                f"in it. {advice}"
            )
    return dict(values)
