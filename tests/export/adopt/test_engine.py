"""From a published ControlNet to a picture."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.build import build
from export.options import Options
from realisid_trt import Control, Engine, Person
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


def latents(engine: Engine, persons: list[Person], **options: Any) -> np.ndarray:
    given: Any = {"seed": 1, "num_inference_steps": 2, "output": "latents", **options}
    return engine.generate("two dancers", persons, **given).latents


@pytest.mark.slow("tables")
def test_a_net_that_was_added_acts_beside_realisid(here: Path, engine_copy: Path) -> None:
    """The checkpoint has the weights of the test's engine, so its build makes the net's three networks and no other."""
    adopt("add --checkpoint CKPT --net openpose=openpose,style=openpose-xinsir --out OUT")
    result = build(Options(checkpoint=here / "OUT", out=engine_copy, backends=("onnxruntime",)))
    assert result["complete"] and all(figures["ratio"] <= 4 for figures in result["verified"].values())
    networks = sorted(name.split(":")[0] for name in result["built"] if ":opset" in name)
    assert networks == ["openpose_branch", "openpose_condition", "openpose_time"]
    rng = np.random.default_rng(0)
    with Engine.load(engine_copy, "onnxruntime", "cpu") as engine:
        assert [row.name for row in engine.config.table] == ["local", "global", "openpose"]
        tokens = rng.standard_normal((engine.model.num_id_tokens, engine.model.cross_attention_dim))
        face: Any = {"id_tokens": tokens, "box": (8, 8, 72, 72), "landmarks": rng.random((478, 2))}
        plain, danced = Person(**face), Person(**face, body=rng.uniform(0, 128, (17, 2)))
        [drawing] = engine.conditions("x", [danced])["openpose"]
        alone, drawn = latents(engine, [plain]), latents(engine, [danced])
        given = latents(engine, [plain], controls={"openpose": Control(drawing)})
        assert not np.array_equal(alone, drawn) and np.array_equal(drawn, given)
        assert not np.array_equal(drawn, latents(engine, [], controls={"openpose": Control(drawing)}))
        assert engine.generate("two dancers", [danced], num_inference_steps=1).images[0].size == (128, 128)


@pytest.mark.long
def test_a_net_of_faces_is_shown_landmarks_or_a_drawing(here: Path) -> None:
    adopt("mediapipe-face --weights face --base SD15 --variant fp16 --out OUT")
    result = build(Options(checkpoint=here / "OUT", out=here / "ENGINE", backends=("onnxruntime",)))
    assert result["complete"] and all(figures["ratio"] <= 4 for figures in result["verified"].values())
    with Engine.load(here / "ENGINE") as engine:
        faces = np.random.default_rng(0).random((2, 478, 2))
        persons = [Person(box=(0, 0, 80, 80), landmarks=faces[0]), Person(box=(40, 40, 128, 128), landmarks=faces[1])]
        [drawing] = engine.conditions("x", persons)["face"]
        assert drawing.shape == (3, 128, 128) and drawing.any()
        nobody, drawn = latents(engine, []), latents(engine, persons)
        given = latents(engine, [], controls={"face": Control(drawing)})
        assert np.array_equal(drawn, given) and not np.array_equal(drawn, nobody)
        assert not np.array_equal(drawn, latents(engine, persons[:1]))
        made = engine.generate("two dancers", persons, num_inference_steps=2)
        assert made.images[0].size == (128, 128) and made.rows["face_branch"] == 2 * 2
