"""The compiled baseline is the baseline, and is compiled before it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.compiled import compiled, every_shape, nothing_new
from benchmarks.naive import NaivePipeline
from benchmarks.scene import make_persons
from export.checkpoint import Checkpoint
from realisid_trt.manifest import Manifest

STEPS = {"num_inference_steps": 2, "decode": False}


@pytest.mark.slow
def test_every_shape_is_compiled_once_and_none_later(engine_dir: Path, checkpoint_dir: Path) -> None:
    """The tracer is the real one; the compiler after it returns the graph unchanged."""
    model = Manifest.read(engine_dir).model
    eager = NaivePipeline(Checkpoint.open(checkpoint_dir))
    latents = np.random.default_rng(0).standard_normal((1, model.latent_channels, 32, 32)).astype(np.float32)
    graphs: list[Any] = []

    def passing_on(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with every_shape():
        ours = compiled(eager, passing_on)
        for count in (1, 2):
            given = "two friends", make_persons(model, count, 128, 128, 0), latents
            before = len(graphs)
            ours.generate(*given, **STEPS)
            # UNet and ControlNets, without the ID and with it; the UNet's rows do not depend on the persons.
            assert len(graphs) - before == (6 if count == 1 else 4)
            with nothing_new():
                again = ours.generate(*given, **{**STEPS, "num_inference_steps": 5})
        assert np.array_equal(again.latents, eager.generate(*given, num_inference_steps=5).latents)
        assert again.rows["unet"] == 2 * 2 + 3 * 3
        with nothing_new(), pytest.raises(RuntimeError, match="recompile"):
            ours.generate("", make_persons(model, 3, 128, 128, 0), latents, **STEPS)
