"""The README says what is true: its commands and its program run, and its tree is the tree."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
LINES = [
    re.split(r"\s{2,}[#(]", line)[0].strip()
    for language, text in BLOCKS
    if not language
    for line in text.replace("\\\n", " ").splitlines()
]
INLINE = re.findall(r"`(python -m [^`…]+)`", README)
COMMANDS = [line for line in [*LINES, *INLINE] if line.startswith("python -m ")]
[TREE] = [text for _, text in BLOCKS if text.startswith("realisid_trt/")]


@pytest.fixture(scope="module")
def folder(engine_dir: Path, checkpoint_dir: Path, photos: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the README would stand: with a checkpoint, photographs, and the engine once it is built."""
    here = tmp_path_factory.mktemp("readme")
    for name in ("NAME", "miniature"):  # the second is what `make demo` builds
        shutil.copytree(engine_dir, here / "engines" / name, copy_function=os.link)
    (here / "CKPT").symlink_to(checkpoint_dir)
    for name, photo in (("alice", photos.astronaut), ("bob", photos.hopper), ("laughing", photos.astronaut)):
        shutil.copy(photo, here / f"{name}.jpg")
    shutil.copy(photos.astronaut, here / "photo.jpg")
    return here


def run(arguments: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def for_the_miniature(text: str) -> str:
    """The README speaks of pictures of 1024 px; the engine of the tests makes them of 128, and needs fewer steps."""
    text = re.sub(r"(?<=[@(,])\s?\d{3}(?=[,)])|(?<=,)\d{3}\b", lambda number: str(int(number[0]) // 8), text)
    shorter = {"--steps 30": "--steps 1", "--runs 3": "--runs 1 --warmup 0", "engines/mid": "engines/NAME"}
    elsewhere = {"export.miniature --out CKPT": "export.miniature --out OWN", "--preset mid": "--preset miniature"}
    for written, instead in (shorter | elsewhere).items():
        text = text.replace(written, instead)
    return text


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program: str, folder: Path) -> None:
    run([sys.executable, "-c", for_the_miniature(program)], folder)
    assert (folder / "out.png").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, folder: Path) -> None:
    _, *arguments = shlex.split(for_the_miniature(command))
    run([sys.executable, *arguments], folder)


def test_every_make_target_and_extra_exists() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    named = re.findall(r"pip install '\.\[([\w,-]+)\]'", README)
    assert set(re.findall(r"\bmake (\w+)", README)) & set(targets) == set(re.findall(r"`?make (demo|test)\b", README))
    assert named and {extra for group in named for extra in group.split(",")} <= set(extras)


def test_the_tree_is_the_tree() -> None:
    shown, parent = set(), Path()
    for line in TREE.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        path = Path(name) if indent == 0 else parent / name
        parent = path if indent == 0 else parent
        assert (ROOT / path).exists(), f"the README's tree shows {path}, which is not there"
        assert name.endswith("/") == (ROOT / path).is_dir(), f"{path} in the README's tree"
        shown.add(path.as_posix())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name and not name.startswith((".", "docs/"))}
    assert folders <= shown, f"not in the README's tree: {sorted(folders - shown)}"


def test_every_picture_and_page_is_there() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
