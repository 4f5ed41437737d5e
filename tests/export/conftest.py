"""The checkpoint and the engine that tests of whole builds begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from export.options import Options


@pytest.fixture
def own(checkpoint_dir: Path, engine_copy: Path, tmp_path: Path) -> Options:
    """A checkpoint and its finished engine, both copies that a test may change."""
    checkpoint = Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))
    return Options(checkpoint=checkpoint, out=engine_copy, backends=("onnxruntime",))
