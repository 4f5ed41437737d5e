"""The options of a build, their checks, and the command line."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from realisid_trt.backends.gpu_facts import gpu_facts
from realisid_trt.backends.tensorrt_flavours import FLAVOURS, RTX_ARCHITECTURES
from realisid_trt.commands.flags import flags_of
from realisid_trt.errors import BackendError, RequestError

from .forms import BACKENDS, Target, targets_of

Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a build was asked for. The command line takes its defaults from here.

    checkpoint:      folder; None: the trained miniature of the source tree.
    out:             engine directory; None: engines/<name of the checkpoint's folder>.
    base_model, variant: see Checkpoint.open.
    precision:       of GPU backends: "fp32", "fp16" or "bf16". ONNX Runtime on a CPU always runs float32.
    backends:        names of backends to build for; empty: ONNX Runtime and every installed TensorRT flavour that can
                     build here.
    architectures:   of portable plans (tensorrt-rtx), such as "sm_89"; empty: all that can run every network.
    gpu_only:        build nothing for a CPU: no float32 networks beside those in half precision.
    only:            networks to build now; empty: all. The engine is published when no network is missing.
    batch, persons:  pictures of one batch, and persons of each, that the engine must hold.
    resolution:      longest side of a picture, px; None: twice the model's own.
    workspace:       GiB that a layer of a plan may use for itself; None: all that the GPU has.
    optimization_level: of TensorRT's builder, 0 to 5; None: its own choice.
    jobs:            networks exported at a time; None: 2 for small checkpoints, else 1.
    bisect:          the error of a failed comparison names the first node that differs.
    face_landmarker: MediaPipe's face_landmarker.task, converted and used instead of the mesh of the wheel.
    face_parser:     BiSeNet face parsing as ONNX.
    """

    checkpoint: Path | None = None
    out: Path | None = None
    base_model: str | None = None
    variant: str | None = None
    precision: str = "fp32"
    backends: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    gpu_only: bool = False
    only: tuple[str, ...] = ()
    batch: int = 4
    persons: int = 8
    resolution: int | None = None
    workspace: float | None = None
    optimization_level: int | None = None
    jobs: int | None = None
    bisect: bool = False
    face_landmarker: Path | None = None
    face_parser: Path | None = None


def checked(options: Options, report: Report) -> tuple[list[Target], Options]:
    """The targets of a build, and its options with their defaults filled in. Imports and reads nothing large.

    Raises RequestError for an impossible option, BackendError for a backend that cannot build here.
    """
    for name in options.backends:
        if name not in BACKENDS:
            raise RequestError(f"--backend {name} is unknown. Known: {', '.join(BACKENDS)}.")
    if importlib.util.find_spec("onnxruntime") is None:
        raise RequestError(
            "every build is verified with ONNX Runtime, which is not installed. pip install 'realisid_trt[cpu]', or "
            "[gpu] on a machine with a GPU."
        )
    least = {"batch": 1, "persons": 0, "resolution": 1, "jobs": 1, "optimization_level": 0}
    for flag, bound in least.items():
        value = getattr(options, flag)
        if value is not None and value < bound:
            raise RequestError(f"--{flag.replace('_', '-')} is {value}, expected at least {bound}.")
    if options.workspace is not None and options.workspace <= 0:
        raise RequestError(f"--workspace is {options.workspace}, expected a number of GiB above 0.")
    if options.optimization_level is not None and options.optimization_level > 5:
        raise RequestError(f"--optimization-level is {options.optimization_level}, expected 0 to 5.")
    backends = tuple(dict.fromkeys(options.backends)) or (
        "onnxruntime",
        *_can_build(options.precision != "fp32", report),
    )
    for name in set(backends) & set(FLAVOURS):
        flavour = FLAVOURS[name]
        report(f"{name}: plans by {flavour.package} {flavour.version}")  # raises if it is not there
        if not flavour.portable:
            facts = gpu_facts()  # raises if there is none
            report(f"{name}: for {facts.name}, {facts.architecture}")
    architectures = tuple(dict.fromkeys(map(architecture, options.architectures)))
    if architectures and "tensorrt-rtx" not in backends:
        raise RequestError(
            "--arch is for the plans of tensorrt-rtx, and this build makes none. Add --backend tensorrt-rtx."
        )
    for name in architectures:
        if name not in RTX_ARCHITECTURES:
            raise RequestError(
                f"--arch {name}: tensorrt-rtx builds for {', '.join(RTX_ARCHITECTURES[1:])}. For others use --backend "
                "tensorrt, on that GPU."
            )
        if name == "sm_75":
            raise RequestError(
                "--arch sm_75: it cannot multiply float32 matrices, and the VAE needs that. Use sm_80 or later."
            )
    if not architectures and "tensorrt-rtx" in backends:
        architectures = tuple(name for name in RTX_ARCHITECTURES if name != "sm_75")
    if options.precision == "bf16" and "onnxruntime" in backends:
        report("ONNX Runtime has no bfloat16 convolutions: --bf16 changes nothing for it.")
    if options.precision == "fp16" and "onnxruntime" in backends and not options.gpu_only:
        report("ONNX Runtime on a CPU runs float32: its networks are built too; those in float16 are for a GPU.")
    targets = [target for name in backends for target in targets_of(name, options.precision)]
    if options.gpu_only:
        targets = [target for target in targets if target.device == "cuda"]
        if not targets:
            raise RequestError(f"--gpu-only: {', '.join(backends)} in {options.precision} is for a CPU. Add --fp16.")
    return targets, replace(options, backends=backends, architectures=architectures)


def _can_build(half: bool, report: Report) -> list[str]:
    """The installed TensorRT flavours that can build a plan on this machine. half: report if none is installed."""
    found = []
    for name, flavour in FLAVOURS.items():
        if not flavour.installed:
            continue
        try:
            if not flavour.portable:
                gpu_facts()
            found.append(flavour.version and name)
        except BackendError as error:
            report(f"no {name} plans: {error}")
    if half and not any(flavour.installed for flavour in FLAVOURS.values()):
        ways = " or ".join(f"'realisid_trt[{name}]'" for name in FLAVOURS)
        report(f"no TensorRT plans: none is installed. pip install {ways}")
    return found


def architecture(text: str) -> str:
    """sm_89, from "sm_89", "sm89", "89" or "8.9". Raises RequestError."""
    digits = text.lower().removeprefix("sm").lstrip("_").replace(".", "")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) not in (2, 3):
        raise RequestError(f"--arch {text}: expected a compute capability such as sm_89 or 8.9.")
    return f"sm_{digits}"


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m export.build`."""
    parser = argparse.ArgumentParser(
        prog="python -m export.build",
        description="Build an engine from a checkpoint: export every network, verify it, publish it.",
        epilog="""examples:
  python -m export.build                                            the miniature, into engines/miniature
  python -m export.build --checkpoint CKPT --out engines/NAME --fp16
  python -m export.build --checkpoint CKPT --fp16 --backend tensorrt-rtx --arch sm_86 sm_89 sm_120
  python -m export.build --checkpoint CKPT --only vae_decoder       one network now, the rest later
Give the same command again to continue a build that was stopped.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    words = {
        "checkpoint": "checkpoint folder; without it: the miniature",
        "out": "engine directory (default: engines/<checkpoint's name>)",
        "base_model": "source of unet, vae and text encoders, if not the checkpoint's",
        "variant": "of the weight files, such as fp16",
    }
    for flag, arguments in flags_of(
        Options, words, checkpoint={"metavar": "DIR"}, out={"metavar": "DIR"}, base_model={"metavar": "DIR|ID"}
    ):
        add(flag, **arguments)
    precision = parser.add_mutually_exclusive_group()
    for name, meaning in (("fp16", "half precision"), ("bf16", "bfloat16")):
        precision.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=f"{meaning} on GPU backends"
        )
    words = {
        "backends": f"{', '.join(BACKENDS)}; may be repeated (default: onnxruntime and every TensorRT flavour "
        "installed)",
        "architectures": "of tensorrt-rtx plans (default: all from sm_80)",
        "gpu_only": "build nothing for a CPU: saves half of the disk space",
        "only": "build these networks only",
        "batch": "pictures of one batch that the engine must hold (default: %(default)s)",
        "persons": "persons of each picture that it must hold (default: %(default)s)",
        "resolution": "longest side of a picture (default: twice the model's own)",
        "workspace": "memory for one layer of a plan (default: all that the GPU has)",
        "optimization_level": "of TensorRT's builder, 0 (quick to build) to 5",
        "jobs": "networks exported at a time (default: 2 for small checkpoints, else 1)",
        "bisect": "name the first node that differs if a network fails its comparison",
        "face_landmarker": "MediaPipe's face_landmarker.task",
        "face_parser": "BiSeNet face parsing, as ONNX",
    }
    flags = flags_of(
        Options, words,
        backends={"flag": "--backend", "action": "append", "nargs": None, "default": None, "metavar": "NAME"},
        architectures={"flag": "--arch", "metavar": "SM"}, only={"metavar": "NETWORK"}, resolution={"metavar": "PX"},
        workspace={"metavar": "GIB"}, optimization_level={"metavar": "N"}, face_landmarker={"metavar": "FILE"},
        face_parser={"metavar": "FILE"},
    )  # fmt: skip
    for flag, arguments in flags:
        add(flag, **arguments)
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser
