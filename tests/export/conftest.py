"""What tests of whole builds begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from export.options import Options


@pytest.fixture
def own(checkpoint_dir: Path, engine_copy: Path, tmp_path: Path) -> Options:
    """A checkpoint and an engine of one's own, the engine fresh."""
    checkpoint = Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))
    return Options(checkpoint=checkpoint, out=engine_copy, backends=("onnxruntime",))
