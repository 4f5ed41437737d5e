"""python -m export.adopt: the command."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from realisid_trt.commands.command_line import Outcome, execute, reporter, run
from realisid_trt.commands.flags import flags_of

from ..checkpoint.face_encoder import OPTIONS
from . import (
    Adopted,
    AdoptOptions,
    NetRequest,
    add_controlnets,
    adopt_controlnets,
    adopt_idpatch,
    adopt_mediapipe_face,
)
from .licences import shown
from .nets import FORM, STYLES
from .publishing import size_text

WORDS = {
    "half": "write the new weights in float16, but for a face encoder's",
    "copy": "copy weights; default: hard links on the same disk",
    "variant": 'of the weight files, e.g. "fp16"',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 made, 1 failed, 2 bad usage."""
    given = vars(_parser().parse_args(arguments))
    as_json = given.pop("json")
    return run(lambda: _adopt(given, as_json), as_json)


def _adopt(given: dict[str, Any], as_json: bool) -> Outcome:
    options = AdoptOptions(**{field.name: given.pop(field.name) for field in fields(AdoptOptions)})
    make: dict[str, Callable[..., Adopted]] = {
        "controlnet": adopt_controlnets, "add": add_controlnets, "mediapipe-face": adopt_mediapipe_face,
        "idpatch": adopt_idpatch,
    }  # fmt: skip
    kind = given.pop("kind")
    if nets := given.pop("net", None):
        given["requests"] = [NetRequest.parse(net) for net in nets]
    made = make[kind](**given, options=options, report=reporter(as_json))
    more = f" --variant {options.variant}" if options.variant else ""
    build = f"python -m export.build --checkpoint {shlex.quote(str(made.path))} --fp16"
    lines = [
        *map(shown, made.licences),
        f"its engine will take about {size_text(made.engine_bytes)} on disk (--fp16 --gpu-only), and "
        f"{size_text(made.loop_bytes)} of the GPU's memory for the weights of a step's networks",
        f"{made.path}: branches {', '.join(made.branches)}. Build it: {build}{more}",
    ]
    values = {
        "path": str(made.path), "branches": made.branches, "licences": made.licences,
        "engine_bytes": made.engine_bytes, "loop_bytes": made.loop_bytes,
    }  # fmt: skip
    return Outcome(values, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.adopt",
        description="Make a checkpoint out of published weights: ControlNets in diffusers' layout, or ID-Patch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m export.adopt controlnet --net openpose=OPENPOSE,style=openpose-xinsir --net depth=DEPTH,end=0.6 \\
      --base stabilityai/stable-diffusion-xl-base-1.0 --out CKPT
  python -m export.adopt add --checkpoint CKPT --net canny=CANNY,scale=0.5 --out CKPT2
  python -m export.adopt mediapipe-face --weights ControlNetMediaPipeFace --base SD15 --variant fp16 --out CKPT
  python -m export.adopt idpatch --weights ID-Patch --base SDXL --face-encoder recognition_arcface_ir_se50.pth \\
      --out CKPT --check ann.jpg ann-too.jpg bob.jpg""",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="controlnet | add | mediapipe-face | idpatch")
    controlnet = kinds.add_parser("controlnet", help="a checkpoint of text and controls, without identities")
    add = kinds.add_parser("add", help="one more ControlNet in a checkpoint")
    face = kinds.add_parser("mediapipe-face", help="CrucibleAI/ControlNetMediaPipeFace, which draws faces")
    patch = kinds.add_parser("idpatch", help="ByteDance/ID-Patch: given persons, each where its patch is")
    for kind in (controlnet, add):
        kind.add_argument(
            "--net", required=True, action="append", metavar="NAME=FOLDER",
            help=f"{FORM}; styles: {', '.join(STYLES)}. May be repeated",
        )  # fmt: skip
    add.add_argument("--checkpoint", required=True, metavar="CKPT", help="the checkpoint that gets it; it is only read")
    face.add_argument("--weights", required=True, metavar="DIR", help="its folder")
    patch.add_argument("--weights", required=True, metavar="DIR", help="folder with ControlNetModel/ and id-patch.bin")
    patch.add_argument(
        "--face-encoder", required=True, metavar="FILE", help="weights of ir_se50 (.pth), or your own encoder as ONNX"
    )
    for name, text in (("colour", "order of the colours it was trained on"), ("norm", "of its embeddings")):
        text = f"{text}: {' or '.join(OPTIONS[name])}; needed for an ONNX file that is not known here"
        patch.add_argument(f"--{name}", choices=OPTIONS[name], metavar=name.upper(), help=text)
    patch.add_argument(
        "--check", nargs=3, metavar=("SAME", "SAME2", "OTHER"),
        help="three photos, two of one person and one of another: the face encoder must tell them apart",
    )  # fmt: skip
    for kind in (controlnet, face, patch):
        kind.add_argument("--base", required=True, metavar="MODEL", help="folder of the base model, or a hub id")
    for kind in (controlnet, add, face, patch):
        kind.add_argument("--out", required=True, metavar="DIR", help="folder to make")
        for flag, arguments in flags_of(AdoptOptions, WORDS):
            kind.add_argument(flag, **arguments)
        kind.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
