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
[TREE] = [text for _, text in BLOCKS if text.startswith("realisid_trt/")]


def commands(block: str) -> list[str]:
    """The lines of a fenced block that run Python modules, without their remarks."""
    lines = [re.split(r"\s{2,}[#(]", line)[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("python -m ")]


def make_targets(text: str) -> set[str]:
    """What is given to `make` at the start of a line or of a piece of code."""
    return set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))


INLINE = dict.fromkeys(re.findall(r"`(python -m [^`…]+)`", README))
SCRIPTS = [found for language, text in BLOCKS if not language and (found := commands(text))]
SCRIPTS += [[command] for command in INLINE]


@pytest.fixture(scope="module")
def folder(engine_dir: Path, checkpoint_dir: Path, photos: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the README would stand: with a checkpoint, photographs, and the engine once it is built."""
    here = tmp_path_factory.mktemp("readme")
    for name in ("NAME", "miniature"):  # the second is what `make demo` builds
        shutil.copytree(engine_dir, here / "engines" / name, copy_function=os.link)
    for name in ("CKPT", "SDXL", "CLIP"):
        (here / name).symlink_to(checkpoint_dir)
    (here / "PHOTOS").mkdir()
    for number, photo in enumerate((photos.astronaut, photos.hopper)):
        shutil.copy(photo, here / "PHOTOS" / f"{number}{photo.suffix}")
        (here / "PHOTOS" / f"{number}.txt").write_text("a portrait")
    for name, photo in (("alice", photos.astronaut), ("bob", photos.hopper), ("laughing", photos.astronaut)):
        shutil.copy(photo, here / f"{name}.jpg")
    shutil.copy(photos.astronaut, here / "photo.jpg")
    (here / "out" / "photos").mkdir(parents=True)  # as `make demo` leaves it
    shutil.copy(photos.astronaut, here / "out" / "photos" / "astronaut.png")
    (here / "benchmarks" / "results").mkdir(parents=True)
    return here


def run(arguments: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def for_the_miniature(text: str) -> str:
    """The command as it stands, for a smaller engine: pictures of 128 px instead of 1024, and fewer steps.

    So the tests prove that the README's commands are spelled right and run, not what it says of their results.
    """
    text = re.sub(r"(?<=[@(,])\s?\d{3}(?=[,)])|(?<=,)\d{3}\b", lambda number: str(int(number[0]) // 8), text)
    shorter = {
        "--steps 30": "--steps 1",
        "--runs 3": "--runs 1 --warmup 0",
        "--steps 20000": "--steps 2",
        "HELD-OUT": "data",
        "engines/mid": "engines/NAME",
        "--checkpoint checkpoints/miniature": "--checkpoint CKPT --experiment placement --pictures 2 --steps 1",
    }
    elsewhere = {"export.miniature --out CKPT": "export.miniature --out OWN", "--preset mid": "--preset miniature"}
    for written, instead in (shorter | elsewhere).items():
        text = text.replace(written, instead)
    return text


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program: str, folder: Path) -> None:
    run([sys.executable, "-c", for_the_miniature(program)], folder)
    assert (folder / "out.png").is_file()


def lane(script: list[str]) -> list[pytest.MarkDecorator]:
    """The first two build a whole engine of their own."""
    long = {"python -m export.build", "python -m export.miniature --preset mid --out MID"}
    return [pytest.mark.long] if script[0] in long else [pytest.mark.slow] if "training" in script[0] else []


@pytest.mark.parametrize("script", [pytest.param(script, marks=lane(script), id=script[0]) for script in SCRIPTS])
def test_commands(script: list[str], folder: Path) -> None:
    """The commands of a block depend on each other: one after the other."""
    for command in script:
        _, *arguments = shlex.split(for_the_miniature(command))
        run([sys.executable, *arguments], folder)


def test_every_make_target_and_extra_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= make_targets(README) <= targets
    assert make_targets("make bogus  # this\nor `make else X=1`, to make one") - targets == {"bogus", "else"}
    extras = re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"pip install '\.\[([\w,-]+)\]'", README)
    assert named and {extra for group in named for extra in group.split(",")} <= set(extras)


def tree() -> list[Path]:
    """Every file and folder that the tree shows; several may share a line, "verify.py: …" behind the first."""
    shown, parent = [], Path()
    for line in TREE.splitlines():
        name, words = line.split(maxsplit=1)
        inside = line.startswith(" ")
        parent = parent if inside else Path(name)
        first = parent / name if inside else parent
        shown += [first, *(parent / second for second in re.findall(r"(\w+\.py):", words))]
        assert name.endswith("/") == (ROOT / first).is_dir(), f"{first} in the README's tree"
    return shown


def test_the_tree_is_there() -> None:
    shown = tree()
    assert Path("export/verify.py") in shown and Path("export/staging.py") in shown
    for path in shown:
        assert (ROOT / path).exists(), f"the README's tree shows {path}, which is not there"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout knows its files")
def test_the_tree_shows_every_folder() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {name.split("/")[0] for name in listed if "/" in name and not name.startswith((".", "docs/"))}
    assert folders <= {path.as_posix() for path in tree()}


def test_every_picture_and_page_is_there() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
