"""The face encoder: photo and face → embedding. The face is aligned by its five points, and an ArcFace sees it.

photo, Face ─► alignment.py ─► (S, S, 3) ─► (x - mean)/std ─► arcface.onnx ─► norm ─► embedding

An embedding means something only to projections that were trained with the same encoder, colours and norm. The
manifest holds them, and `id_encoder_key` is their hash.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checks import check_finite, own_array
from ...errors import EngineDamaged, NumericsError, RequestError
from ...manifest import FACE_ENCODER, Manifest
from ..photo import LoadedPhoto
from . import Face
from .alignment import Alignment
from .cv_net import CvNet, Floats, rebuild

ROUNDING = 1e-6  # of a float32's length: an embedding this close to length 1 has it
LOOKS_NORMALISED = 1e-3  # raw embeddings of ArcFaces have lengths of about 20


class FaceEncoder:
    """An engine's face_encoder/ folder, loaded once. Safe to share between threads: one call at a time runs.

    alignment: how it sees a face. output_dim: numbers of an embedding. norm: "unit" or "raw".
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """config: `model.face_encoder` of the manifest. Raises EngineDamaged for another file than the config's."""
        self.alignment = Alignment.of(config)
        self.output_dim, self.norm = int(config["output_dim"]), str(config["norm"])
        self._is_bgr = config["colour"] == "bgr"
        self._mean, self._std = np.float32(config["mean"]), np.float32(config["std"])
        self._net, self._lock = CvNet(folder / config["file"]), threading.Lock()
        if self._net.sha256 != config["sha256"]:
            raise EngineDamaged(
                f"{self._net.path} has the sha256 {self._net.sha256[:12]}…, and the manifest says "
                f"{config['sha256'][:12]}…: it is another face encoder. {rebuild(folder)}"
            )

    @classmethod
    def of(cls, manifest: Manifest) -> FaceEncoder | None:
        """The face encoder of an engine, None if it has none. Raises EngineDamaged."""
        config = manifest.model.face_encoder
        return None if config is None else cls(manifest.path / FACE_ENCODER, config)

    def embed(self, aligned: NDArray[np.uint8], name: str = "photo") -> Floats:
        """(output_dim,) float32: the embedding of an aligned face, in the norm that the projections were trained with.

        aligned: (size, size, 3) uint8 RGB, from `alignment`. name: of the photo in messages.

        Raises NumericsError for NaN, and for an embedding of length 0 that shall have length 1.
        """
        picture = aligned[..., ::-1] if self._is_bgr else aligned
        pixels = (picture.astype(np.float32) - self._mean) / self._std
        with self._lock:
            [output] = self._net(pixels.transpose(2, 0, 1)[None]).values()
        if output.size != self.output_dim:
            raise EngineDamaged(
                f"{self._net.path} gives {output.shape}, expected (1, {self.output_dim}). "
                f"{rebuild(self._net.path.parent)}"
            )
        embedding = check_finite(output.reshape(self.output_dim), f"the embedding of {name}")
        if self.norm == "unit" and not embedding.any():
            raise NumericsError(f"the embedding of {name} is 0 and has no direction. Check the face encoder's weights.")
        return in_norm(embedding, self.norm)

    def checked(self, embedding: Any, name: str, of_identity: bool = False) -> Floats:
        """(output_dim,) float32: a caller's embedding, in the norm that the projections were trained with.

        name: of the person in messages. of_identity: this encoder made it, so that its length is that of its output.

        Raises RequestError for another shape, NaN and zeros; for a vector of length 1 where the norm is "raw".
        """
        values = own_array(embedding, (self.output_dim,), f"the embedding of {name}")
        length = float(np.linalg.norm(values.astype(np.float64)))
        if length == 0:
            raise RequestError(f"the embedding of {name} is all zeros: it is nobody's. Give that of a face.")
        if self.norm == "raw" and not of_identity and abs(length - 1) <= LOOKS_NORMALISED:
            raise RequestError(
                f"the embedding of {name} looks normalised (its length is {length:.4f}), and this checkpoint was "
                "trained with raw ones. Give the encoder's output as it is: InsightFace's embedding, not its "
                "normed_embedding."
            )
        return in_norm(values, self.norm)

    def __call__(self, photo: LoadedPhoto, face: Face, name: str = "photo") -> Floats:
        """(output_dim,) float32: the embedding of a face. photo: as given to `FaceFinder.find`, not turned.

        Raises NumericsError, and RequestError if the five points of the face coincide.
        """
        return self.embed(self.alignment(photo, face), name)


def in_norm(embedding: Floats, norm: str) -> Floats:
    """The embedding with the length that the projections were trained with: 1 for "unit", its own for "raw".

    embedding: (512,) float32, not 0 for "unit". Applied again it changes nothing.
    """
    if norm == "raw":
        return embedding
    length = float(np.linalg.norm(embedding.astype(np.float64)))
    return embedding if abs(length - 1) <= ROUNDING else np.asarray(embedding / length, np.float32)
