"""Engines of other tables than RealisID's: built when a test first needs one, and kept while it is fresh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from export.building.origins import remember
from export.files import write_json
from realisid_trt.errors import RealisIDError
from realisid_trt.manifest import Manifest
from tests.conftest import ENGINES, ROOT, Built, by_turns, stamp_of

# name → how its checkpoint is made. idpatch: ID-Patch. controlnet, sd15: ControlNets "openpose" and "depth", which read
# the text. mixed: RealisID, and an "openpose" that ends after six tenths of the steps.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "controlnet": {"seed": 2, "method": "controlnet"},
    "sd15": {"seed": 3, "method": "controlnet", "family": "sd15"},
    "mixed": {"seed": 4, "method": "mixed"},
    "idpatch": {"seed": 5, "method": "idpatch"},
}
WITHOUT_ATTENTION = {"controlnet": "depth"}  # a net as the published `-small` ones: no token reaches it
HALF_TOO = ("controlnet", "mixed", "idpatch")  # built in float16 as well, for GPUs


@lru_cache
def built_method(name: str) -> Built:
    """The checkpoint and its engine, for ONNX Runtime on a CPU. Built as a user would, unless it is fresh."""
    if "REALISID_TRT_TEST_ENGINE" in os.environ:
        pytest.skip("builds an engine, and this machine tests one that was built elsewhere")
    found = Built(ENGINES / f"test-{name}-checkpoint", ENGINES / f"test-{name}")
    if "STAND_IN_KERNELS" in os.environ:  # in a rehearsal, the process that began it has built it
        return found
    with by_turns():
        stamp = ENGINES / f".tests-{name}.json"
        if not _fresh(stamp, name, found):
            stamp.unlink(missing_ok=True)
            _build(name, found)
            write_json(stamp, _stamp_of(name, found))
        remember(Manifest.read(found.engine).values, checkpoint=found.checkpoint, base_model=None, variant=None)
    return found


def _stamp_of(name: str, found: Built) -> dict[str, Any]:
    options = [CHECKPOINTS[name], WITHOUT_ATTENTION.get(name), name in HALF_TOO]
    return stamp_of({name: found}) | {"options": options}


def _fresh(stamp: Any, name: str, found: Built) -> bool:
    """Whether the engine is the one that the stamp describes, file by file."""
    try:
        if json.loads(stamp.read_text(encoding="utf-8")) != _stamp_of(name, found):
            return False
        Manifest.read(found.engine).check_files()
    except (OSError, ValueError, RealisIDError):
        return False
    return True


def _build(name: str, found: Built) -> None:
    from export.miniature import make_checkpoint

    shutil.rmtree(found.checkpoint, ignore_errors=True)
    make_checkpoint(found.checkpoint, **CHECKPOINTS[name])
    if name in WITHOUT_ATTENTION:
        _take_attention(found.checkpoint / f"controlnet_{WITHOUT_ATTENTION[name]}", CHECKPOINTS[name]["seed"])
    command = [sys.executable, "-m", "export.build", "--checkpoint", str(found.checkpoint), "--out", str(found.engine)]
    command += ["--jobs", "1", "--backend", "onnxruntime", *(["--fp16"] if name in HALF_TOO else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"the build of {name} failed:\n{done.stdout}{done.stderr}"


def _take_attention(folder: Path, seed: int) -> None:
    """Another ControlNet of random weights in this folder: the same, without attention."""
    from diffusers import ControlNetModel

    from export.checkpoint.classes import quiet
    from export.miniature.weights import draw
    from tests.export.adopt.published import SMALL

    with quiet():
        net = ControlNetModel.from_config({**ControlNetModel.load_config(folder), **SMALL})
        for name, parameter in net.named_parameters():
            parameter.data = draw(seed, folder.name, name, tuple(parameter.shape))
        shutil.rmtree(folder)
        net.save_pretrained(folder)
