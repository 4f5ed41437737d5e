"""python -m export.miniature: the command."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from realisid_trt.branches import BRANCH_OPTIONS
from realisid_trt.commands.command_line import Outcome, execute, ratio, run
from realisid_trt.config import OPTIONS

from . import make_checkpoint
from .presets import FAMILIES, METHODS, PREDICTIONS, PRESETS, Recipe

POOLED = BRANCH_OPTIONS["pooled"]
RATIO = "subject_conditioning_ratio"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 made, 1 failed, 2 bad usage."""
    given = vars(_parser().parse_args(arguments))
    as_json = given.pop("json")
    return run(lambda: _make(given), as_json)


def _make(given: dict[str, Any]) -> Outcome:
    start = time.monotonic()
    if RATIO in given:
        given[RATIO] = ratio(given[RATIO], "--" + RATIO.replace("_", "-"))
    path = make_checkpoint(given.pop("out"), progress=True, **given)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    seconds = time.monotonic() - start
    values = {"path": str(path), "bytes": size, "seconds": round(seconds, 2)}
    return Outcome(values, [f"{path}: {size / 1e6:.1f} MB in {seconds:.1f} s"])


def _parser() -> argparse.ArgumentParser:
    """The command line, with the defaults of Recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m export.miniature",
        description="Make a checkpoint of the real classes with random weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m export.miniature --out CKPT
  python -m export.miniature --out checkpoints/sd15 --family sd15 --vae-factor 8
  python -m export.miniature --out checkpoints/tokens77 --id-tokens 77 --null-id file
  python -m export.miniature --out checkpoints/full-size --preset sdxl     # 13 GB""",
    )
    default, add = Recipe(), parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder to make")
    add("--seed", type=int, default=default.seed, help="same seed, same bytes (default %(default)s)")
    add("--preset", choices=PRESETS, default=default.preset, help="default %(default)s")
    add("--method", choices=METHODS, default=default.method, help="default %(default)s")
    add("--family", choices=FAMILIES, default=default.family, help="default %(default)s")
    add("--vae-factor", type=int, choices=(4, 8), help="default 4 for the miniature, else 8")
    add("--prediction", choices=PREDICTIONS, default=default.prediction, help="default %(default)s")
    add("--projection", choices=("linear", "resampler"), help="default linear, unless --id-tokens needs a resampler")
    add("--id-tokens", type=int, metavar="N", help="default: one per image token; 16 for the resampler")
    keys = parser.add_argument_group("keys of realisid_config.json")
    for key, value in default.realisid.to_dict().items():
        flag, shown = "--" + key.replace("_", "-"), f"default {value}"
        given: dict[str, Any] = {"default": argparse.SUPPRESS}  # a method has defaults of its own
        if choices := {**OPTIONS, "branch_pooled_text": POOLED}.get(key):
            keys.add_argument(flag, choices=choices, help=shown, **given)
        elif isinstance(value, bool):
            keys.add_argument(flag, action=argparse.BooleanOptionalAction, help=shown, **given)
        elif key == RATIO:
            keys.add_argument(flag, metavar="α", help=f'or "none"; {shown}', **given)
        else:
            kind = float if isinstance(value, float) else int
            keys.add_argument(flag, type=kind, metavar="N", help=f"default {value or 'the VAE factor'}", **given)
    add("--force", action="store_true", help="replace a checkpoint that this command made")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
