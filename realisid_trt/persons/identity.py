"""An identity: the result of `Engine.embed`, stored instead of the photo."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import finite, own_array, whole
from ..errors import EngineMismatch, PhotoError, RequestError
from ..files import whole_or_not
from .mesh import NUM_LANDMARKS

_FORMAT = "realisid-identity-1"


@dataclass(frozen=True, eq=False)
class Identity:
    """One person, ready for generation without a photo.

    id_tokens:      (T, D) float32, p_id of the paper. Read-only.
    landmarks:      (478, 2) float64, in units of the squared face box: [0, 1] across it. Read-only.
    box:            x0, y0, x1, y1 of the squared face box in photo px: pixels of the upright original, EXIF
                    orientation applied, and turned if a note says so.
    photo_size:     (height, width) of that upright original, px.
    id_encoder_key: hash of the image encoder and projection that made the tokens.
    mask_source:    mask that removed the background: "bisenet", "hull+person", "hull"; "own" for the caller's own crop.
    notes:          decisions made on the way, in sentences.

    Arrays are copied. Raises RequestError for an impossible field.
    """

    id_tokens: NDArray[np.float32]
    landmarks: NDArray[np.float64]
    box: tuple[float, float, float, float]
    photo_size: tuple[int, int]
    id_encoder_key: str
    mask_source: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        tokens = own_array(self.id_tokens, None, "id_tokens of an identity")
        if tokens.ndim != 2:
            raise RequestError(f"id_tokens of an identity are {tokens.shape}, expected (T, D).")
        landmarks = own_array(self.landmarks, (NUM_LANDMARKS, 2), "landmarks of an identity", np.float64)
        for name in ("id_encoder_key", "mask_source"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} of an identity is {getattr(self, name)!r}, expected a string.")
        for array in (tokens, landmarks):
            array.setflags(write=False)
        kept = {
            "id_tokens": tokens,
            "landmarks": landmarks,
            "box": _box(self.box),
            "photo_size": _size(self.photo_size),
            "notes": tuple(str(note) for note in self.notes),
        }
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self), tuple(fields)  # unpickled identities are checked and read-only too

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all. Raises DiskError."""
        from safetensors.numpy import save

        metadata = {
            "format": _FORMAT,
            "box": json.dumps(self.box),
            "photo_size": json.dumps(self.photo_size),
            "id_encoder_key": self.id_encoder_key,
            "mask_source": self.mask_source,
            "notes": json.dumps(self.notes),
        }
        content = save({"id_tokens": self.id_tokens, "landmarks": self.landmarks}, metadata)
        with whole_or_not(Path(path)) as partial:
            partial.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Identity:
        """The stored identity. Raises PhotoError(identity) if the file cannot be read, is damaged or is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise PhotoError(
                        "identity",
                        f"{path} is not a stored identity (format {metadata.get('format')!r}, expected {_FORMAT!r}). "
                        "Make one: python -m realisid_trt embed --engine … photo.jpg --out alice.safetensors",
                    )
                return cls(
                    id_tokens=file.get_tensor("id_tokens"),
                    landmarks=file.get_tensor("landmarks"),
                    box=json.loads(metadata["box"]),
                    photo_size=json.loads(metadata["photo_size"]),
                    id_encoder_key=metadata["id_encoder_key"],
                    mask_source=metadata["mask_source"],
                    notes=json.loads(metadata["notes"]),
                )
        except PhotoError:
            raise
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise PhotoError(
                "identity", f"{path} cannot be read as a stored identity ({error}). Make it again with embed."
            ) from None

    def check(self, id_encoder_key: str, source: str) -> None:
        """Raises EngineMismatch if another encoder made the tokens: they would show another face."""
        if self.id_encoder_key != id_encoder_key:
            raise EngineMismatch(
                f"{source} was made by another ID encoder ({self.id_encoder_key[:12]}…, this engine's is "
                f"{id_encoder_key[:12]}…). Embed the photo again with this engine."
            )


def _box(box: Any) -> tuple[float, float, float, float]:
    """Four finite numbers that span an area."""
    numbers = [finite(number) for number in _items(box)]
    if len(numbers) == 4 and None not in numbers:
        x0, y0, x1, y1 = (float(number) for number in numbers if number is not None)
        if x0 < x1 and y0 < y1:
            return x0, y0, x1, y1
    raise RequestError(f"box of an identity is {box!r}, expected x0, y0, x1, y1 with x0 < x1 and y0 < y1.")


def _size(size: Any) -> tuple[int, int]:
    sides = [whole(side) for side in _items(size)]
    if len(sides) == 2:
        height, width = sides
        if height is not None and width is not None and height > 0 and width > 0:
            return height, width
    raise RequestError(f"photo_size of an identity is {size!r}, expected (height, width) in pixels.")


def _items(values: Any) -> list[Any]:
    """The items of a sequence, array or tensor; empty for anything else."""
    try:
        return [] if isinstance(values, (str, bytes, dict, set)) else list(values)
    except TypeError:
        return []
