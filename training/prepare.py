"""python -m training.prepare: makes examples.

Every flag is a field of a class of examples (examples.py, pictures.py), with the field's default.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from export.checkpoint import Checkpoint
from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.commands.flags import flags_of

from .examples import WorldFaces, WorldScenes
from .pictures import PictureFolder, others_of
from .store import Examples, store_of

KINDS: dict[str, type[Any]] = {"scenes": WorldScenes, "faces": WorldFaces, "pictures": PictureFolder}
HELP = {
    "scenes": "pictures of one to three people of the world, with captions",
    "faces": "pairs of siblings of the world, in several views each",
    "pictures": "a folder of your own photos with captions",
}


def number(text: str) -> float:
    """A number or a fraction, such as 1/8."""
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 1/8") from None


SHOWN = "default %(default)s"
RANGE = {"type": number, "metavar": ("LEAST", "GREATEST"), "help": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad usage."""
    given = vars(_parser().parse_args(arguments))
    as_json = given.pop("json")
    return run(lambda: _prepare(**given), as_json)


def _prepare(
    kind: str,
    out: str,
    checkpoint: str | None = None,
    base_model: str | None = None,
    variant: str | None = None,
    **options: Any,
) -> Outcome:
    start = time.monotonic()
    if checkpoint is not None:
        c = Checkpoint.open(checkpoint, base_model=base_model, variant=variant)
        side = c.sample_size * c.vae_scale_factor
        least = max(options["least_face"], (c.vae_scale_factor << (c.levels - 1)) / side)
        options |= {"size_px": side, "crop_px": c.image_size, "margin": c.config.face_margin, "least_face": least}
    examples: Examples = KINDS[kind](**options)
    store = store_of(examples, out, progress=True)
    seconds = round(time.monotonic() - start, 1)
    others = others_of(options["folder"]) if kind == "pictures" else []
    counts = f"{len(store)} examples, {len(store.left_out)} left out"
    return Outcome(
        {
            "path": str(store.path),
            "examples": len(store),
            "left_out": store.left_out,
            "not_looked_at": others,
            "seconds": seconds,
        },
        [
            *(f"left out: {reason}" for reason in store.left_out.values()),
            *(f"not looked at: {name} is neither a picture nor a caption" for name in others),
            f"{store.path}: {counts}{f', {len(others)} files not looked at' if others else ''}, {seconds} s",
        ],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare",
        description="Make the examples of a training. Existing examples are kept; a stopped run continues.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.prepare scenes --pictures 80000 --out out/training/scenes
  python -m training.prepare scenes --pictures 60000 --first 1000000 --persons 1 --crop-px 64 \\
    --out out/training/portraits
  python -m training.prepare faces --pairs 16000 --out out/training/faces
  python -m training.prepare pictures --folder PHOTOS --checkpoint CKPT --face-models engines/NAME/faces --out data""",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, cls in KINDS.items():
        one = kinds.add_parser(kind, help=HELP[kind], description=cls.__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        fields = {field.name: field for field in dataclasses.fields(cls)}
        words = {
            name: "default: none" if field.default == () else "" if field.default is dataclasses.MISSING else SHOWN
            for name, field in fields.items()
        }
        ranges = {name: RANGE for name, field in fields.items() if isinstance(field.default, tuple) and field.default}
        for flag, arguments in flags_of(cls, words, **ranges):
            one.add_argument(flag, **arguments)
        if kind == "pictures":
            one.add_argument(
                "--checkpoint", metavar="CKPT", help="checkpoint to train: sets --size-px, --crop-px and --margin"
            )
            one.add_argument("--base-model", metavar="MODEL", help="folder or hub id for what the checkpoint lacks")
            one.add_argument("--variant", help='of the checkpoint\'s weight files, e.g. "fp16"')
        one.add_argument("--out", required=True, metavar="DIR", help="folder to make")
        one.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
