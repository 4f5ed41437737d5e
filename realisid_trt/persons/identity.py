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

FORMATS = {"realisid-identity-1": "id_tokens", "realisid-identity-2": "embedding"}  # format → what it holds
ARRAYS = {"id_tokens": ("id_tokens",), "embedding": ("embedding", "keypoints")}  # beside the landmarks
NAMES = {"id_tokens": "ID tokens", "embedding": "an embedding"}
MAKE = "python -m realisid_trt embed --engine … photo.jpg --out alice.safetensors"


@dataclass(frozen=True, eq=False)
class Identity:
    """One person, ready for generation without a photo. It holds ID tokens or an embedding, as the engine that made it
    needs them.

    id_tokens:      (T, D) float32, p_id of the paper; or None. Read-only.
    landmarks:      (478, 2) float64, in units of the squared face box: [0, 1] across it. Read-only.
    box:            x0, y0, x1, y1 of the squared face box in photo px: pixels of the upright original, EXIF
                    orientation applied, and turned if a note says so.
    photo_size:     (height, width) of that upright original, px.
    id_encoder_key: hash of what made the tokens, image encoder and projection, or the embedding, the face encoder.
    mask_source:    mask that removed the background: "bisenet", "hull+person", "hull"; "own" for the caller's own crop;
                    "aligned" for an aligned face, which keeps its background.
    notes:          decisions made on the way, in sentences.
    embedding:      (E,) float32, the face encoder's output in the norm that its engine's projections take; or None.
                    Read-only.
    keypoints:      (5, 2) float64, with an embedding: the points by which the face was aligned, in photo px as the box:
                    the eye on the picture's left, the other eye, nose, corners of the mouth. Read-only.

    Exactly one of id_tokens and embedding is given. Arrays are copied. Raises RequestError for an impossible field.
    """

    id_tokens: NDArray[np.float32] | None
    landmarks: NDArray[np.float64]
    box: tuple[float, float, float, float]
    photo_size: tuple[int, int]
    id_encoder_key: str
    mask_source: str
    notes: tuple[str, ...] = ()
    embedding: NDArray[np.float32] | None = None
    keypoints: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if (self.id_tokens is None) == (self.embedding is None):
            raise RequestError(
                f"an identity has {'both' if self.embedding is not None else 'neither'} id_tokens and embedding, "
                "expected exactly one of them."
            )
        if (self.embedding is None) != (self.keypoints is None):
            raise RequestError("keypoints of an identity belong to an embedding: give both or neither.")
        arrays = {"landmarks": own_array(self.landmarks, (NUM_LANDMARKS, 2), "landmarks of an identity", np.float64)}
        if self.id_tokens is not None:
            arrays["id_tokens"] = _array(self.id_tokens, 2, "id_tokens", "(T, D)")
        if self.embedding is not None:
            arrays["embedding"] = _array(self.embedding, 1, "embedding", "(E,)")
            arrays["keypoints"] = own_array(self.keypoints, (5, 2), "keypoints of an identity", np.float64)
        for name in ("id_encoder_key", "mask_source"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} of an identity is {getattr(self, name)!r}, expected a string.")
        for array in arrays.values():
            array.setflags(write=False)
        kept = {
            **arrays,
            "box": _box(self.box),
            "photo_size": _size(self.photo_size),
            "notes": tuple(str(note) for note in self.notes),
        }
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self), tuple(fields)  # unpickled identities are checked and read-only too

    @property
    def kind(self) -> str:
        """What it holds: "id_tokens" or "embedding"."""
        return "embedding" if self.id_tokens is None else "id_tokens"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all: of format 1 with ID tokens, of format 2 with an embedding.

        Raises DiskError.
        """
        from safetensors.numpy import save

        metadata = {
            "format": next(name for name, kind in FORMATS.items() if kind == self.kind),
            "box": json.dumps(self.box),
            "photo_size": json.dumps(self.photo_size),
            "id_encoder_key": self.id_encoder_key,
            "mask_source": self.mask_source,
            "notes": json.dumps(self.notes),
        }
        arrays = {name: getattr(self, name) for name in (*ARRAYS[self.kind], "landmarks")}
        content = save(arrays, metadata)
        with whole_or_not(Path(path)) as partial:
            partial.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Identity:
        """The stored identity, of format 1 or 2. Other tensors in the file, such as those of words, are left alone.

        Raises PhotoError(identity) if the file cannot be read, is damaged or is not one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                kind = FORMATS.get(metadata.get("format", ""))
                if kind is None:
                    expected = " or ".join(repr(name) for name in FORMATS)
                    raise PhotoError(
                        "identity",
                        f"{path} is not a stored identity (format {metadata.get('format')!r}, expected {expected}). "
                        f"Make one: {MAKE}",
                    )
                arrays = {"id_tokens": None} | {name: file.get_tensor(name) for name in ARRAYS[kind]}
                return cls(
                    **arrays,
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

    def check(self, id_encoder_key: str, source: str, kind: str = "id_tokens") -> None:
        """Raises EngineMismatch if it does not hold what an engine needs, or if another encoder made it: it would show
        another face.

        id_encoder_key, kind: of the engine, see the property `kind`. source: the identity in messages.
        """
        if self.kind != kind:
            raise EngineMismatch(
                f"{source} holds {NAMES[self.kind]}, and this engine needs {NAMES[kind]}. One cannot be made of the "
                f"other: embed the photo with this engine, {MAKE}"
            )
        if self.id_encoder_key != id_encoder_key:
            raise EngineMismatch(
                f"{source} was made by another ID encoder ({self.id_encoder_key[:12]}…, this engine's is "
                f"{id_encoder_key[:12]}…). Embed the photo again with this engine."
            )


def _array(values: Any, axes: int, name: str, expected: str) -> NDArray[np.float32]:
    array = own_array(values, None, f"{name} of an identity")
    if array.ndim != axes:
        raise RequestError(f"{name} of an identity has shape {array.shape}, expected {expected}.")
    return array


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
