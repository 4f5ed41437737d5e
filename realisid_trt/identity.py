"""An identity: what `Engine.embed` takes from a photo, to be kept instead of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import EngineMismatch, PhotoError

_FORMAT = "realisid-identity-1"


@dataclass(frozen=True, eq=False)
class Identity:
    """One person, ready for generation: no photo is needed any more.

    id_tokens:      (T, D) float32, p_id of the paper.
    landmarks:      (478, 2) float64, in units of the squared face box: [0, 1] across it.
    box:            x0, y0, x1, y1 of the squared face box in pixels of the photo.
    photo_size:     (height, width) of the photo, upright.
    id_encoder_key: hash of the image encoder and projection that made the tokens.
    mask_source:    what removed the background: "bisenet" or "hull+person".
    notes:          what was decided on the way, in sentences.
    """

    id_tokens: NDArray[np.float32]
    landmarks: NDArray[np.float64]
    box: tuple[float, float, float, float]
    photo_size: tuple[int, int]
    id_encoder_key: str
    mask_source: str
    notes: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        path = Path(path)
        metadata = {
            "format": _FORMAT,
            "box": json.dumps(self.box),
            "photo_size": json.dumps(self.photo_size),
            "id_encoder_key": self.id_encoder_key,
            "mask_source": self.mask_source,
            "notes": json.dumps(self.notes),
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file({"id_tokens": self.id_tokens, "landmarks": self.landmarks}, partial, metadata=metadata)
            partial.chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Identity:
        """The stored identity. Raises PhotoError if the file is not one."""
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
                    box=tuple(json.loads(metadata["box"])),
                    photo_size=tuple(json.loads(metadata["photo_size"])),
                    id_encoder_key=metadata["id_encoder_key"],
                    mask_source=metadata["mask_source"],
                    notes=tuple(json.loads(metadata["notes"])),
                )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, PhotoError):
                raise
            raise PhotoError(
                "identity", f"{path} cannot be read as a stored identity ({error}). Make it again with embed."
            ) from None

    def check(self, id_encoder_key: str, source: str) -> None:
        """Raises EngineMismatch if another encoder made the tokens: they would mean another face."""
        if self.id_encoder_key != id_encoder_key:
            raise EngineMismatch(
                f"{source} was made by another ID encoder ({self.id_encoder_key[:12]}…, this engine's is "
                f"{id_encoder_key[:12]}…). Embed the photo again with this engine."
            )
