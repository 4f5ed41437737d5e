"""The checkpoint appears whole or not at all: killed at any access to the disk, and on full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from export.adopt.__main__ import main
from export.checkpoint import Checkpoint
from tests.conftest import ROOT
from tests.export.adopt.test_adopt import adopt, digests

ENCODER = " --face-encoder arcface.onnx --colour bgr --norm unit"
# Forks again and again. Each fork kills itself at a later access to something in or beside OUT.
KILLER = """import json, os, signal, sys
from pathlib import Path
from export.adopt.__main__ import main
from export.checkpoint.classes import module_class
for name in ("ControlNetModel", "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModelWithProjection"):
    module_class(name)  # imported once, and not in every fork
out, stride, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
KINDS = ("open", "ctypes.dlopen", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

def child(moment):
    count = 0
    def count_down(kind, given):
        nonlocal count
        if kind in KINDS and (kind == "ctypes.dlopen" or out.name in str(given)):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count_down)
    os._exit(main(arguments))

moment, status = 1, -1
while status != 0:
    if not (number := os.fork()):
        child(moment)
    status = os.waitpid(number, 0)[1]
    print(json.dumps([status, sorted(p.relative_to(out).as_posix() for p in out.rglob("*"))]), file=sys.stderr)
    moment += stride
"""


def killed(out: Path, stride: int, command: str) -> list[tuple[int, list[str]]]:
    """(status, files of OUT) after each kill, and after the run that ends."""
    line = [sys.executable, "-c", KILLER, str(out), str(stride), *command.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(text)) for text in done.stderr.splitlines() if text.startswith("[")]


@pytest.mark.slow("adopt killed")
@pytest.mark.parametrize("kind", ["controlnet --net canny=canny", f"idpatch --weights ID-Patch{ENCODER}"])
def test_killed_at_any_moment(kind: str, here: Path) -> None:
    out = here / "made" / "KILLED"
    states = killed(out, 4, f"{kind} --base SDXL --half --out made/KILLED")
    assert len(states) >= 5 and states[-1][0] == 0 and all(status == 9 for status, _ in states[:-1])
    whole = states[-1][1]
    assert all(files in ([], whole) for _, files in states) and states[0][1] == []
    Checkpoint.open(out).check_weights()
    assert [path.name for path in out.parent.iterdir()] == ["KILLED"]  # the last run removed what the others left


@pytest.mark.slow("adopt killed")
def test_killed_while_it_replaces(here: Path) -> None:
    adopt("controlnet --net small=small --base SDXL --out made/KILLED")
    out = here / "made" / "KILLED"
    old = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    states = killed(out, 4, "controlnet --net canny=canny --base SDXL --out made/KILLED")
    new = states[-1][1]
    assert len(states) >= 5 and old != new and all(files in (old, new) for _, files in states)
    assert [path.name for path in out.parent.iterdir()] == ["KILLED"]


def test_the_disk_is_asked_before_anything_is_written(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40 - 65 * 2**20, 65 * 2**20))
    adopt("controlnet --net canny=canny --base SDXL --out LINKED")  # a link takes no space
    before = sorted(here.rglob("*"))
    for more in ("--half", "--copy"):
        assert main(f"controlnet --net canny=canny --base SDXL --out OUT {more}".split()) == 1
        said = capsys.readouterr().err
        assert "the checkpoint needs about 0.1 GB and" in said and "Free some space, or choose --out on another" in said
    assert main(["add", "--checkpoint", "LINKED", "--net", "b=openpose", "--copy", "--out", "OUT"]) == 1
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("how", ["--half", "--copy"])
def test_a_disk_that_refuses_leaves_what_was_there(how: str, here: Path, capsys: Any) -> None:
    """With a limit on the size of files."""
    adopt("controlnet --net small=small --base SDXL --out OUT")
    before = digests(here / "OUT")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        assert main(["controlnet", "--net", "canny=canny", "--base", "SDXL", "--out", "OUT", how]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "OUT could not be written" in capsys.readouterr().err
    assert digests(here / "OUT") == before
    assert not [name for name in os.listdir(here) if name.startswith(".")]


def test_a_full_disk_is_said(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", refuse)
    assert main(["controlnet", "--net", "canny=canny", "--base", "SDXL", "--out", "OUT", "--copy"]) == 1
    assert f"the disk of {here} is full. Free some space" in capsys.readouterr().err
    assert not (here / "OUT").exists()
