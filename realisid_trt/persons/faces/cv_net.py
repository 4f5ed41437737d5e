"""One small ONNX graph on OpenCV's dnn module. The face front end therefore needs no other runtime."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ... import manifest
from ...errors import EngineDamaged
from ...files import sha256

Floats = NDArray[np.float32]


def rebuild(folder: Path) -> str:
    """The command that rebuilds `folder`, the faces/ folder of an engine."""
    return manifest.rebuild(folder.parent)


class CvNet:
    """An ONNX file of an engine's faces/ folder, loaded; a call returns every output by name.

    sha256: of the file, in hex.

    Footgun: `cv2.dnn` nets hold state: one call at a time (FaceFinder has the lock). And OpenCV 5.0 fails unless all
    outputs of an ONNX graph are asked for, which is why this class always does.
    """

    def __init__(self, path: Path) -> None:
        """Raises EngineDamaged when the file is missing or OpenCV cannot read it."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EngineDamaged(
                f"{path} is missing or unreadable ({error.strerror}). {rebuild(path.parent)}"
            ) from error
        self.path = path
        self.sha256 = sha256(content)
        try:
            self._net = cv2.dnn.readNetFromONNX(np.frombuffer(content, np.uint8))
            self._outputs = [str(output) for output in self._net.getUnconnectedOutLayersNames()]
        except (cv2.error, ValueError) as error:
            raise EngineDamaged(
                f"{path} cannot be read by OpenCV {cv2.__version__} ({_first_line(error)}). {rebuild(path.parent)}"
            ) from error

    def __call__(self, image: Floats | None = None, /, **inputs: Floats) -> dict[str, Floats]:
        """What the graph computes from one image (B, C, H, W) float32, or from several inputs by name.

        Returns {output name: array}. Raises EngineDamaged when the graph does not take these inputs.
        """
        if image is not None:
            inputs[""] = image  # OpenCV's name for the first input, whatever the file calls it
        try:
            for input_name, values in inputs.items():
                self._net.setInput(np.ascontiguousarray(values, np.float32), input_name)
            results = (np.asarray(result, np.float32) for result in self._net.forward(self._outputs))
            return dict(zip(self._outputs, results, strict=True))
        except cv2.error as error:
            shapes = ", ".join(f"{input_name} {values.shape}".strip() for input_name, values in inputs.items())
            raise EngineDamaged(
                f"{self.path} does not run on {shapes} ({_first_line(error)}). {rebuild(self.path.parent)}"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
