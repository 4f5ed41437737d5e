"""python -m benchmarks.kit KIT ITEM --out DIR: puts an item of a kit in its place. `benchmarks.gpu` runs this."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from realisid_trt.commands.command_line import Outcome, execute, run

from .index import Kit
from .place import place


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 in its place, 1 failed, 2 not available."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kit",
        description="Put an item of a kit in its place: an engine or a checkpoint, weights drawn again, verified.",
        epilog="""examples:
  python -m benchmarks.kit gpu-kit miniature --out engines/miniature-fp16
  python -m benchmarks.kit gpu-kit sdxl --out engines/sdxl-fp16""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kit", type=Path, metavar="KIT", help="folder with the parts that were copied")
    parser.add_argument("item", metavar="ITEM", help="such as miniature, sdxl or sdxl-checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    options = parser.parse_args(arguments)

    def command() -> Outcome:
        start = time.perf_counter()
        written = place(Kit.open(options.kit), options.item, options.out)
        seconds = round(time.perf_counter() - start, 1)
        outcome = f"{written / 1e6:.1f} MB in {seconds} s" if written else "up to date"
        values = {"item": options.item, "out": str(options.out), "bytes": written, "seconds": seconds}
        return Outcome(values, [f"{options.out}: {outcome}"])

    return run(command, options.json)


if __name__ == "__main__":
    sys.exit(execute(main))
