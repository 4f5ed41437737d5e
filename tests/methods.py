"""Engines of other tables than RealisID's: built when a test first needs one, and kept while it is fresh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from typing import Any

import pytest

from export.building.origins import remember
from export.files import write_json
from realisid_trt.errors import RealisIDError
from realisid_trt.manifest import Manifest
from tests.conftest import ENGINES, ROOT, Built, _by_turns, stamp_of

# name → how its checkpoint is made. controlnet, sd15: ControlNets "openpose" and "depth", which read the text. mixed:
# RealisID, and an "openpose" that ends after six tenths of the steps.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "controlnet": {"seed": 2, "method": "controlnet"},
    "sd15": {"seed": 3, "method": "controlnet", "family": "sd15"},
    "mixed": {"seed": 4, "method": "mixed"},
}


@lru_cache
def built_method(name: str) -> Built:
    """The checkpoint and its engine, for ONNX Runtime on a CPU. Built as a user would, unless it is fresh."""
    if "REALISID_TRT_TEST_ENGINE" in os.environ:
        pytest.skip("builds an engine, and this machine tests one that was built elsewhere")
    found = Built(ENGINES / f"test-{name}-checkpoint", ENGINES / f"test-{name}")
    with _by_turns():
        stamp = ENGINES / f".tests-{name}.json"
        if not _fresh(stamp, name, found):
            stamp.unlink(missing_ok=True)
            _build(name, found)
            write_json(stamp, _stamp_of(name, found))
        remember(Manifest.read(found.engine).values, checkpoint=found.checkpoint, base_model=None, variant=None)
    return found


def _stamp_of(name: str, found: Built) -> dict[str, Any]:
    return stamp_of({name: found}) | {"options": CHECKPOINTS[name]}


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
    command = [sys.executable, "-m", "export.build", "--checkpoint", str(found.checkpoint), "--out", str(found.engine)]
    done = subprocess.run(
        [*command, "--jobs", "1", "--backend", "onnxruntime"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, f"the build of {name} failed:\n{done.stdout}{done.stderr}"
