"""python -m training.world: draws a sheet of the world."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import RequestError
from realisid_trt.files import whole_or_not

from .sampling import World
from .scenes import LEAST_SIZE_PX
from .sheet import make_sheet

MOST_SHEET_PX = 512  # side of a picture on a sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 made, 1 failed, 2 bad usage."""
    given = _parser().parse_args(arguments)
    return run(lambda: _make(given.sheet, given.seed, given.size), given.json)


def _make(path: Path, seed: int, size_px: int) -> Outcome:
    if path.suffix.lower() != ".png":
        raise RequestError(f"--sheet is {str(path)!r}, expected the name of a .png file.")
    if not LEAST_SIZE_PX <= size_px <= MOST_SHEET_PX:
        raise RequestError(f"--size is {size_px}, expected {LEAST_SIZE_PX} to {MOST_SHEET_PX} px.")
    start = time.monotonic()
    sheet, drawn = make_sheet(World(seed), size_px)
    seconds = time.monotonic() - start
    with whole_or_not(path) as partial:
        Image.fromarray(sheet).save(partial)
    values = {"path": str(path), "pictures": drawn, "seconds": round(seconds, 3), "size_px": size_px}
    return Outcome(values, [f"{path}: a sheet of {drawn} pictures of {size_px} px, drawn in {seconds:.2f} s"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.world",
        description="Draw a sheet of the procedural world that the miniature RealisID is trained on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.world --sheet out.png
  python -m training.world --sheet out.png --seed 7 --size 128""",
    )
    add = parser.add_argument
    add("--sheet", required=True, type=Path, metavar="PNG", help="file to write")
    add("--seed", type=int, default=0, help="which world: same seed, same bytes (default %(default)s)")
    add("--size", type=int, default=256, metavar="PX", help="side of a picture (default %(default)s)")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
