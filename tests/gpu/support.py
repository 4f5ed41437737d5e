"""Helpers that the tests of a GPU share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

STEPS = {"num_inference_steps": 5, "subject_conditioning_ratio": 0.7}  # of the pictures that are compared


def float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are opened on the GPU take their float32 networks from now on."""
    from realisid_trt.manifest import Manifest

    chosen = Manifest.build_for
    monkeypatch.setattr(Manifest, "build_for", lambda self, backend, device="cpu": chosen(self, backend, "cpu"))


def person(model: Any, seed: int, box: tuple[float, float, float, float]) -> Any:
    """A person, given by ID tokens and a drawing."""
    from realisid_trt import Person

    rng = np.random.default_rng(seed)
    side = model.default_size
    return Person(
        id_tokens=rng.standard_normal((model.num_id_tokens, model.cross_attention_dim)).astype(np.float32),
        pose_image=rng.random((3, side, side)).round().astype(np.float32),
        box=box,
    )


def relative_rms(ours: Any, truth: Any) -> float:
    exact = np.asarray(truth, np.float64)
    return float(np.sqrt(np.mean((np.asarray(ours, np.float64) - exact) ** 2) / np.mean(exact**2)))


def captures(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step that this engine captures."""
    gpu: Any = engine.backend._gpu
    found, capture = list[int](), gpu.capture
    monkeypatch.setattr(gpu, "capture", lambda work: (found.append(1), capture(work))[1])
    return found
