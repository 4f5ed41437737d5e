"""Published folders, made once, and a working folder with links to them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.export.adopt.published import make_bases, make_published
from tests.export.adopt.published_idpatch import make_idpatch


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """openpose, canny, small, face; ID-Patch, arcface.onnx; SDXL, SD15, CKPT."""
    folder = tmp_path_factory.mktemp("published")
    make_published(folder)
    make_idpatch(folder)
    make_bases(folder)
    return folder


@pytest.fixture
def here(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder. Its files are hard links: a test replaces them and writes into none."""
    folder = Path(shutil.copytree(originals, tmp_path / "here", copy_function=os.link))
    monkeypatch.chdir(folder)
    return folder
