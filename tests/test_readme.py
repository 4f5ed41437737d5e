"""README and docs say what is true: commands and programs run; files, links, flags, extras and errors are there."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import realisid_trt.errors
from tests.conftest import PASSING
from tests.downloads import FACE_ENCODER, ID_PATCH, SDXL, make_downloads
from tests.methods import built_method
from tests.pages import (
    BLOCKS,
    FENCED,
    NOT_RUN,
    PAGES,
    PROGRAMS,
    README,
    ROOT,
    SCRIPTS,
    SHELL,
    Script,
    commands,
    inline,
    inline_commands,
    why_not,
)

MOST_LINES = 140  # of the README


@pytest.fixture(scope="module")
def folder(engine_dir: Path, checkpoint_dir: Path, photos: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a reader would be in, with a checkpoint, photographs and built engines."""
    here = tmp_path_factory.mktemp("readme")
    for name in ("NAME", "miniature", "mid"):  # the second is what `make demo` builds
        shutil.copytree(engine_dir, here / "engines" / name, copy_function=os.link, ignore=PASSING)
    for name in ("CKPT", "SDXL", "CLIP"):
        (here / name).symlink_to(checkpoint_dir)
    for name in ("OPENPOSE", "DEPTH", "CANNY"):
        (here / name).symlink_to(checkpoint_dir / "controlnet_local")
    (here / "checkpoints").symlink_to(ROOT / "checkpoints")
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


@pytest.fixture(scope="module")
def downloads(photos: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who begins with the README: two photographs, the face encoder's file, and a stand-in for
    `hf` that copies small folders of the published names and shapes, with random numbers."""
    here = tmp_path_factory.mktemp("downloads")
    make_downloads(here)
    for name, photo in (("alice", photos.astronaut), ("bob", photos.hopper)):
        shutil.copy(photo, here / f"{name}.jpg")
    return here


def run(arguments: list[str], folder: Path) -> None:
    own = [str(folder / "bin"), str(Path(sys.executable).parent)]  # the first may hold a stand-in for `hf`
    path = os.pathsep.join([*own, os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def provide_engines(text: str, folder: Path) -> None:
    """Engines of other tables, and drawings for them, where commands name them."""
    for name, method in (("openpose", "controlnet"), ("idpatch", "idpatch")):
        if f"engines/{name}" in text and not (folder / "engines" / name).exists():
            shutil.copytree(
                built_method(method).engine, folder / "engines" / name, copy_function=os.link, ignore=PASSING
            )
    Image.new("RGB", (128, 128), "navy").save(folder / "pose.png")
    for name, shift in (("alice", 0), ("bob", 60)):
        joints = [[10 + shift + 2 * joint, 8 + 6 * joint, 0.9] for joint in range(17)]
        (folder / f"{name}.json").write_text(json.dumps(joints))


def for_the_miniature(text: str) -> str:
    """The command as it stands, for a smaller engine: pictures of 128 px instead of 1024, and fewer steps.

    So the tests prove that commands are spelled right and run, not what the pages say of their results.
    """
    pattern = r"(?<=[@(,])\s?\d{3}(?=[,)])|(?<=,)\d{3}\b|(?<=at=)\d{3}(?=:)|(?<=\d:)\d{3}\b"
    text = re.sub(pattern, lambda number: str(int(number[0]) // 8), text)
    shorter = {
        "--steps 30": "--steps 1",
        "--runs 3": "--runs 1 --warmup 0",
        "--baseline none": "--baseline none --steps 1 --runs 1 --warmup 0",
        "--steps 20000": "--steps 2",
        "--resolution 1024": "--resolution 128",
        "HELD-OUT": "data",
        "--checkpoint checkpoints/miniature": "--checkpoint CKPT --experiment placement --pictures 2 --steps 1",
    }
    elsewhere = {"export.miniature --out CKPT": "export.miniature --out OWN", "--preset mid": "--preset miniature"}
    for written, instead in (shorter | elsewhere).items():
        text = text.replace(written, instead)
    return text


def is_beginning(found: tuple[str, ...]) -> bool:
    """Whether these are the README's commands from downloads to a picture."""
    return any(command.startswith("hf download ByteDance/ID-Patch --revision") for command in found)


def lane(page: str, *found: str) -> list[pytest.MarkDecorator]:
    """Scripts that build an engine are long. The README's are fast, but for trainings and benchmarks; a page's scripts
    share a lane, because later ones need what earlier ones made."""
    if "python -m export.build" in found or any("--preset mid" in command for command in found):
        return [pytest.mark.long]
    if is_beginning(found):
        return [pytest.mark.long]
    if page == "docs/controls.md":  # needs an engine of another table, as the tests of that lane do
        return [pytest.mark.slow("controlnet")]
    quick = page == "README.md" and not any("training" in command or "benchmarks" in command for command in found)
    return [] if quick else [pytest.mark.slow(page)]


@pytest.mark.parametrize(
    "program", [pytest.param(text, marks=lane(page), id=f"{page}-{n}") for n, (page, text) in enumerate(PROGRAMS)]
)
def test_programs(program: str, folder: Path) -> None:
    provide_engines(program, folder)
    (folder / "out.png").unlink(missing_ok=True)
    run([sys.executable, "-c", for_the_miniature(program)], folder)
    assert (folder / "out.png").is_file() or "out.png" not in program


@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=lane(s.page, *s.commands), id=f"{s.page}: {s.commands[0]}") for s in SCRIPTS]
)
def test_commands(script: Script, request: pytest.FixtureRequest) -> None:
    """The commands of a block depend on each other: one after the other."""
    folder: Path = request.getfixturevalue("downloads" if is_beginning(script.commands) else "folder")
    provide_engines(" ".join(script.commands), folder)
    for command in script.commands:
        program, *arguments = shlex.split(for_the_miniature(command))
        if program == "polygraphy" and shutil.which(program, path=str(Path(sys.executable).parent)) is None:
            pytest.skip("Polygraphy is not installed: pip install '.[debug]'")
        run([sys.executable if program == "python" else program, *arguments], folder)


@pytest.mark.long
def test_the_five_commands_make_photographs_of_two_persons(downloads: Path) -> None:
    """After the README's commands: what was downloaded, adopted, built and drawn."""
    [script] = (script for script in SCRIPTS if is_beginning(script.commands))
    assert script.page == "README.md" and len(script.commands) == 5
    if not (downloads / "out.png").exists():
        for command in script.commands:
            program, *arguments = shlex.split(for_the_miniature(command))
            run([sys.executable if program == "python" else program, *arguments], downloads)
    files = {path.relative_to(downloads / "SDXL").as_posix() for path in (downloads / "SDXL").rglob("*.safetensors")}
    assert files == {
        f"{folder}.fp16.safetensors"
        for folder in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model",
                       "text_encoder_2/model")
    }  # fmt: skip
    values = json.loads((downloads / "engines" / "photographs" / "manifest.json").read_text())
    encoder = values["model"]["face_encoder"]
    assert (encoder["name"], encoder["colour"], encoder["norm"]) == ("ir_se50", "bgr", "unit")
    licences = {line["part"]: line["licence"] for line in values["licences"]}
    assert licences["controlnet_id_patch"] == "openrail++" and licences["base_model"]
    with Image.open(downloads / "out.png") as picture:
        assert picture.size == (128, 128) and min(high - low for low, high in picture.getextrema()) > 30


def test_the_hub_and_its_stand_in_take_the_same_flags() -> None:
    """The README's downloads, as the real `hf` of the installed huggingface_hub understands them."""
    help_ = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", "download", "--help"]
    done = subprocess.run(help_, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    found = [command for command in commands(README) if command.startswith("hf download")]
    assert [command.split()[2] for command in found] == [ID_PATCH, SDXL]
    for flag in {flag for command in found for flag in re.findall(r"--[\w-]+", command)}:
        assert re.search(rf"^\s*{flag}\b", done.stdout, re.MULTILINE), flag
    assert README.count(FACE_ENCODER) == 2  # its address, and the file


@pytest.mark.slow("docs/debug.md")
def test_polygraphy_reduces_a_network_to_its_broken_node(engine_dir: Path, tmp_path: Path) -> None:
    """The command of docs/debug.md leaves one node of a network whose last bias is infinite."""
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install '.[debug]'")
    model = onnx.load(engine_dir / "onnx" / "opset23-fp16" / "unet_time.onnx")
    names = {name for node in model.graph.node for name in node.input}
    *_, bias = (each for each in model.graph.initializer if each.name in names and each.name.endswith(".bias"))
    bias.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(bias), np.inf), bias.name))
    onnx.save(model, tmp_path / "BROKEN.onnx")
    [command] = re.findall(r"^polygraphy debug reduce .*$", PAGES["docs/debug.md"], re.MULTILINE)
    run(shlex.split(command), tmp_path)
    [node] = onnx.load(tmp_path / "reduced.onnx").graph.node
    assert bias.name in node.input


def test_every_command_is_run_or_has_a_reason() -> None:
    """Blocks of commands are marked `sh` and hold nothing else, other blocks hold none, no reason is left over."""
    found = {command for page in PAGES for command in inline_commands(page)}
    for page, kind, text in BLOCKS:
        begins = [command.split()[0] in SHELL for command in commands(text)]
        assert all(begins) if kind == "sh" else kind == "python" or not any(begins), (page, text)
        found |= {*commands(text)} if kind == "sh" else set()
    run_here = {command for script in SCRIPTS for command in script.commands}
    assert run_here == {command for command in found if why_not(command) is None}
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in found), f"no page has {pattern}"


# Names in the pages


def make_targets(text: str) -> set[str]:
    """The arguments of `make` at the start of a line or of a piece of code."""
    return set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))


def test_every_make_target_and_extra_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= make_targets(README)
    assert set.union(*map(make_targets, PAGES.values())) <= targets
    assert make_targets("make bogus  # this\nor `make else X=1`, to make one") - targets == {"bogus", "else"}
    extras = re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"pip install '\.\[([\w,-]+)\]'", "\n".join(PAGES.values()))
    assert named and {extra for group in named for extra in group.split(",")} <= set(extras)


@functools.cache
def flags_of(module: str) -> set[str]:
    """Every flag of `python -m MODULE` and of its commands: of all parsers that it makes to say its --help."""
    home = importlib.import_module(module)
    main = (home if hasattr(home, "main") else importlib.import_module(f"{module}.__main__")).main
    made: list[argparse.ArgumentParser] = []
    begin = argparse.ArgumentParser.__init__

    def remembered(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        made.append(self)

    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
        patched.setattr(argparse.ArgumentParser, "__init__", remembered)
        main(["--help"])
    return {flag for parser in made for action in parser._actions for flag in action.option_strings}


@pytest.mark.slow("docs flags")
def test_every_module_and_flag_exists() -> None:
    """Of `python -m MODULE … --flag`, even if the command has an ellipsis; a flag alone belongs to some command."""
    alone, modules = set[str](), set[str]()
    for page in PAGES:
        fenced = [command for of, kind, text in BLOCKS if of == page and kind == "sh" for command in commands(text)]
        for piece in [*fenced, *inline(page)]:
            flags = set(re.findall(r"(?<!\S)--[a-z][\w-]*", piece))
            if module := re.search(r"(?:python|launch) -m ([\w.]+)", piece):
                modules.add(module[1])
                assert flags <= flags_of(module[1]), (page, piece)
            elif piece.startswith("--"):
                alone |= flags
    assert "training.train" in modules and not alone - set.union(*map(flags_of, modules))


@pytest.mark.slow("docs flags")
def test_the_flags_of_a_build_are_all_there() -> None:
    assert flags_of("export.build") - {"-h", "--help"} <= {*re.findall(r"--[\w-]+", PAGES["docs/build.md"])}


def test_every_error_and_code_is_there() -> None:
    page = PAGES["docs/service.md"]
    for name, found in inspect.getmembers(realisid_trt.errors, inspect.isclass):
        if issubclass(found, (Exception, Warning)):
            assert f"`{name}`" in page, name
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "realisid_trt").rglob("*.py"))
    codes = set(re.findall(r'PhotoError\(\s*"(\w+)"', sources))
    table = page[page.index("| code | meaning |") :]
    assert codes == {
        code for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for code in re.findall(r"`(\w+)`", cell)
    }


def test_what_a_caller_must_know_of_id_patch_is_there() -> None:
    """In the changelog, the keys that outputs got; in docs/debug.md, what shows a person without a box."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("## 0.5.0")[1].split("New:")[0]
    for word in ("`mask_source`", '"aligned"', "`kind`", "`anchor`", "`keypoints`"):
        assert word in changes, word
    section = PAGES["docs/debug.md"].split("## A person stands in the wrong place")[1].split("\n## ")[0]
    assert "`at`" in section and "`--save-conditions`" in section


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_resolves(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page: str) -> None:
    """Pieces of code that are a path into one of the project's folders."""
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"engines", "out"}
    for piece in inline(page):
        if re.fullmatch(r"[\w.-]+/[\w./-]*", piece) and piece.split("/")[0] in rooms:
            assert (ROOT / piece).exists(), f"{page} names {piece}"


# The README and the tree


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def tracked() -> list[str]:
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout knows its files")


@needs_git
def test_the_readmes_tree_shows_every_room() -> None:
    [tree] = [text for _, text in FENCED.findall(README) if text.startswith("realisid_trt/")]
    shown = [line.split(maxsplit=1)[0] for line in tree.splitlines()]
    rooms = {f"{name.split('/')[0]}/" for name in tracked() if "/" in name and not name.startswith(".")}
    assert sorted(shown) == sorted(rooms)


def files_of_the_tree() -> list[str]:
    """Every file that docs/tree.md lists, from the root: a heading is a folder, an item begins with a file's name."""
    listed, here = list[str](), ""
    for line in PAGES["docs/tree.md"].splitlines():
        if heading := re.fullmatch(r"#+ ([\w/]+/|\./)", line):
            here = heading[1].removeprefix("./")
        elif item := re.match(r"- `([^`]+)`: \S", line):
            listed.append(here + item[1])
    return listed


@needs_git
def test_the_tree_lists_every_file_and_no_other() -> None:
    listed = files_of_the_tree()
    sources = [name for name in tracked() if Path(name).suffix in (".py", ".cu", ".cuh", ".h", ".cpp")]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(sources), set(listed) ^ set(sources)
