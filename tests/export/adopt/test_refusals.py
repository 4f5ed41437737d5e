"""Whatever is wrong, the command says what, what was expected and what to do. It leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from export.adopt.__main__ import main
from tests.export.adopt.bad_commands import BASES, COMMANDS
from tests.export.adopt.bad_idpatch import IDPATCH
from tests.export.adopt.bad_sources import SOURCES, prepare
from tests.export.checkpoint.test_refusals import without_privileges

BAD = COMMANDS | SOURCES | BASES | IDPATCH


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, here: Path, capsys: Any) -> None:
    spoil, command, status, pieces = BAD[name]
    prepare(here)
    spoil(here)
    before = names(here)
    assert main(command.split()) == status
    said = capsys.readouterr().err
    for piece in pieces:
        assert piece in said
    assert said.startswith("error: ") and said.count("\n") == 1
    assert names(here) == before and not (here / "ran").exists()


@pytest.mark.parametrize(
    "name", ["openpose/config.json", "SDXL/model_index.json", "SDXL/scheduler/scheduler_config.json"]
)
def test_what_may_not_be_read_is_named(
    name: str, originals: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        os.chmod(place, 0o755)
        here = Path(shutil.copytree(originals, Path(place) / "here"))
        for path in (here, *here.rglob("*")):  # safetensors writes files that only their owner may read
            path.chmod(0o755)
        monkeypatch.chdir(here)
        Path(name).chmod(0)
        with without_privileges():
            assert main(["controlnet", "--net", "openpose=openpose", "--base", "SDXL", "--out", "OUT"]) == 1
        monkeypatch.undo()
    said = capsys.readouterr().err
    assert f"{name} cannot be read (Permission denied). Get the right to read it (chmod -R u+rX" in said


def test_help_has_examples(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0 and "python -m export.adopt add --checkpoint CKPT" in capsys.readouterr().out
