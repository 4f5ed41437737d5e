"""From a published ControlNet to a picture."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from realisid_trt import Control, Engine
from realisid_trt.commands.inspect_engine import inspect_engine
from tests.conftest import ROOT
from tests.export.adopt.test_adopt import adopt


@pytest.mark.long
def test_an_adopted_checkpoint_makes_pictures(here: Path) -> None:
    """The build compares every network and the whole engine with torch; here the control acts, and licences arrive."""
    adopt("controlnet --net openpose=openpose,style=openpose-xinsir --base SDXL --out OUT")
    command = f"-m export.build --checkpoint {here}/OUT --out {here}/ENGINE --backend onnxruntime --jobs 1 --json"
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["complete"]
    assert "licence of controlnet_openpose (openpose): apache-2.0" in inspect_engine(str(here / "ENGINE")).lines
    with Engine.load(here / "ENGINE") as engine:
        shown = np.random.default_rng(0).random((3, 128, 128), np.float32)
        made = [
            np.asarray(engine.generate("a dancer", controls=controls, seed=1, num_inference_steps=2).images[0])
            for controls in ({}, {"openpose": Control(shown)}, {"openpose": Control(shown, scale=0.5)})
        ]
    assert made[0].shape == (128, 128, 3)
    assert not any(np.array_equal(made[a], made[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
