"""The pages of the project, README and docs/, and the commands and programs in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, kind, text) for page, whole in PAGES.items() for kind, text in FENCED.findall(whole)]
SHELL = ("python", "realisid", "pip", "make", "polygraphy", "accelerate", "hf")  # programs that commands begin with

# Commands that no test runs as they stand, by pattern, each with the reason.
NOT_RUN = {
    r"make (demo|test|test-all)( TORCH_INDEX=\S+)?": "installs an environment; tests/examples runs the demo's programs",
    r"pip install '\.\[[\w,-]+\]'": "needs the network; every extra is checked below",
    r"make gpu-test": "needs a GPU; tests/benchmarks/test_gpu.py runs its parts",
    r"python -m benchmarks\.gpu (--only|--kit) .*": "needs a GPU; tests/benchmarks/test_gpu.py",
    r"python -m benchmarks\.gpu --prepare gpu-kit": "takes an hour and 60 GB; tests/benchmarks/test_kit.py",
    r"python -m export\.miniature --preset sdxl .*": "takes a minute and 10 GB; tests/export/miniature",
    r"python -m export\.build .*(--arch|--gpu-only)( .*)?": "builds plans for minutes; tests/export/test_plans.py",
    r"python -m export\.adopt mediapipe-face .*": "needs a base model of SD 1.5; tests/export/adopt/test_adopt.py",
    r"python -m export\.adopt idpatch .* --check .*": "needs a trained encoder; tests/export/adopt/test_idpatch.py",
    r"python -m realisid_trt .* --out (one|other)\.png": "needs ID-Patch's weights; the README's commands are run",
    r"python -m benchmarks\.parity .*": "needs a clone of the published code; tests/benchmarks/test_parity.py",
    r"python -m export\.build .* --bisect": "compares nothing where the engine stands; tests/export/test_bisect.py",
    r"accelerate launch .*": "needs several GPUs; tests/training/test_processes.py trains in two processes",
    r"hf (download ID|download ByteDance/ID-Patch --local-dir|models info) ?.*": "needs the network",
    r"polygraphy run .* --trt .*": "needs a GPU with TensorRT",
    r"polygraphy debug reduce .*": "a test of its own runs it, on a network that it broke",
    r"python -c .*from_single_file.*": "needs a model of gigabytes in one file",
    r"python -m training\.recipe (STEP|branches --check 50)": "trains for minutes; tests/training/test_recipe.py",
    r"python -m training\.paper_metrics": "needs weights of others; tests/training/test_paper_metrics.py",
    r"python -m training\.evaluate": "is named without its flags; docs/results.md has them",
}


class Script(NamedTuple):
    """Commands that depend on each other, in the order in which they are run, and the page that has them."""

    page: str
    commands: tuple[str, ...]


def commands(block: str) -> list[str]:
    """The commands of a fenced block, one a line, without comments."""
    lines = [re.split(r"\s{2,}#", line)[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line]


def inline(page: str) -> list[str]:
    """Pieces of code within the text of a page."""
    return [" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", FENCED.sub("", PAGES[page]))]


def inline_commands(page: str) -> list[str]:
    """The pieces of code that are commands: a program and its arguments, with nothing left out."""
    return [
        piece for piece in inline(page) if piece.startswith(tuple(f"{name} " for name in SHELL)) and "…" not in piece
    ]


def why_not(command: str) -> str | None:
    """The reason why no test runs a command, or None."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def scripts() -> Iterator[Script]:
    """Every command that is run, once; blocks first, because pieces of code in the text build upon nothing."""
    found = [Script(page, tuple(commands(text))) for page, kind, text in BLOCKS if kind == "sh"]
    found += [Script(page, (command,)) for page in PAGES for command in inline_commands(page)]
    known: set[str] = set()
    for page, asked in found:
        wanted = tuple(command for command in asked if why_not(command) is None)
        if not known.issuperset(wanted):
            known.update(wanted)
            yield Script(page, wanted)


SCRIPTS = list(scripts())
PROGRAMS = [(page, text) for page, kind, text in BLOCKS if kind == "python"]
