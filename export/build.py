"""python -m export.build: a checkpoint → a verified engine directory. The whole road, resumable and atomic."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realisid_trt.backends.gpu_facts import gpu_facts
from realisid_trt.backends.tensorrt_flavours import FLAVOURS, RTX_ARCHITECTURES
from realisid_trt.command_line import Outcome, execute, reporter, run
from realisid_trt.errors import BackendError, BuildError, CheckpointError, RequestError
from realisid_trt.machine import available_bytes, unsupported
from realisid_trt.manifest import MANIFEST, Manifest, seal

from .files import check_space, target_folder, write_json
from .forms import BACKENDS, Target, targets_of
from .staging import Staging, open_staging

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .profiles import Profile
    from .staging import Artifact

SMALL_BYTES = 2**30  # checkpoints up to this size are compared as a whole with the reference


@dataclass(frozen=True)
class Options:
    """What a build was asked for. The command line takes its defaults from here.

    checkpoint:      folder; None: the trained miniature of the source tree.
    out:             engine directory; None: engines/<name of the checkpoint's folder>.
    base_model, variant: see Checkpoint.open.
    precision:       of GPU backends: "fp32", "fp16" or "bf16". ONNX Runtime on a CPU runs float32 whatever is asked.
    backends:        which to build for; empty: ONNX Runtime and every TensorRT flavour that is installed and can build.
    architectures:   of portable plans (tensorrt-rtx), such as "sm_89"; empty: every one that runs all networks.
    gpu_only:        nothing for a CPU: no float32 networks beside the half ones.
    only:            networks to build now; the engine is complete when no network is missing.
    batch, persons:  pictures of one batch, and persons of each, that the engine must hold.
    resolution:      longest side of a picture, px; None: twice the model's own.
    workspace:       GiB that a layer of a plan may use for itself; None: what the GPU has.
    optimization_level: of TensorRT's builder, 0 to 5; None: its own choice.
    jobs:            networks exported at a time; None: 2 for small checkpoints, else 1.
    bisect:          a network that fails its comparison names the first node that differs.
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


Report = Callable[[str], None]


def build(options: Options, report: Report = lambda line: None, progress: bool = False) -> dict[str, Any]:
    """Builds, verifies and publishes an engine. Returns what was done, as JSON values.

    report:   gets a line of text for everything a person should know.
    progress: draw a bar on stderr.

    Raises BuildError, ParityError, DiskError or CheckpointError; the engine that was there before is then untouched,
    and the same command goes on where it stopped.
    """
    start = time.perf_counter()
    if problem := unsupported():
        raise BuildError(problem)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two exporting processes must not spin against each other
    targets, options = _check(options, report)
    path = options.checkpoint or miniature_checkpoint()
    name = Path(os.path.realpath(path)).name
    asked = options.out or Path("engines") / name
    out = target_folder(asked)

    # Behind the cheap checks: these bring torch.
    from .checkpoint import Checkpoint
    from .describe import describe
    from .networks import networks
    from .origins import remember
    from .planning import onnx_jobs, plan_jobs, profiles_of
    from .plans import build_plans
    from .small_parts import kernel_pack, small_parts
    from .workers import export_all

    checkpoint = Checkpoint.open(path, base_model=options.base_model, variant=options.variant)
    checkpoint.check_weights()
    known = networks(checkpoint)
    if unknown := sorted(set(options.only) - set(known)):
        raise RequestError(f"--only {' '.join(unknown)}: no such network. Known: {', '.join(known)}.")

    with_plans = any(target.has_plans for target in targets)
    if with_plans:
        _report_profiles(profiles_of(checkpoint, known, options), report)

    with open_staging(out) as staging:
        made, jobs = onnx_jobs(staging, checkpoint, known, targets, options)
        to_build = [(target, name) for target in targets if target.has_plans for name in options.only or known]
        if made:
            report(f"{len(made)} of {len(made) + len(jobs)} networks stand from an earlier build")
        wanted = [job for job in jobs if not options.only or job.network in options.only]
        # What stands of the plans is known when the graphs are there.
        likely = [known[name].elements(checkpoint) * target.form_of(name).itemsize for target, name in to_build]
        _check_space(out.parent, [job.bytes for job in wanted], likely if wanted else [], report)
        made |= export_all(staging, wanted, options.jobs, progress)
        built = [job.artifact for job in wanted]
        plans, plans_to_build = plan_jobs(staging, checkpoint, known, targets, made, options)
        made |= plans
        wanted_plans = [job for job in plans_to_build if not options.only or job.network in options.only]
        if wanted_plans:
            _check_space(out.parent, [], [job.bytes for job in wanted_plans], report)
            report(f"building {len(wanted_plans)} plans for {', '.join(options.architectures) or 'this GPU'}")
        made |= build_plans(staging, wanted_plans, progress)
        _report_slow([made[job.artifact] for job in wanted_plans], report)
        built += [job.artifact for job in wanted_plans]
        if missing := [name for target in targets for name in map(target.artifact, known) if name not in made]:
            report(f"{len(missing)} networks are still missing; the engine stays as it is. Finish without --only.")
            return {"out": str(asked), "complete": False, "built": built, "missing": missing}
        made |= small_parts(staging, checkpoint, options.face_landmarker, options.face_parser)
        if any(target.device == "cuda" for target in targets):
            made |= kernel_pack(staging)
        manifest = describe(checkpoint, made, list(known), targets, options.architectures)
        if staging.stands(manifest, _verifiable(staging, checkpoint, manifest)):
            manifest = staging.current
            report(f"{asked} is what this command builds; nothing to do")
        else:
            _verify_whole(staging, checkpoint, manifest, options.bisect, report)
            staging.publish(manifest, list(made))
    remember(manifest, checkpoint=path, base_model=options.base_model, variant=options.variant)
    return {
        "out": str(asked),
        "complete": True,
        "built": built,
        "reused": [artifact for artifact in made if artifact not in built],
        "bytes": sum(listed["bytes"] for listed in manifest["files"].values()),
        "seconds": round(time.perf_counter() - start, 1),
        "verified": manifest["verified"],
    }


def miniature_checkpoint() -> Path:
    """The checkpoint built without --checkpoint: the trained miniature. Raises CheckpointError if it is not there."""
    folder = Path(__file__).resolve().parents[1] / "checkpoints" / "miniature"
    if not folder.is_dir():
        raise CheckpointError(
            f"no --checkpoint is given, and the trained miniature is not in {folder}: it is part of the source tree "
            "and not of an installed package. Name your own, or make one with random weights: "
            "python -m export.miniature --out CKPT."
        )
    return folder


def _check(options: Options, report: Report) -> tuple[list[Target], Options]:
    """What to build, and the options with their defaults filled in. Cheap: nothing large is imported or read."""
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
        raise RequestError(f"--workspace is {options.workspace}, expected GiB, more than none.")
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
            "--arch is for the plans of tensorrt-rtx, which is not built here. Add --backend tensorrt-rtx."
        )
    for name in architectures:
        if name not in RTX_ARCHITECTURES:
            raise RequestError(
                f"--arch {name}: tensorrt-rtx builds for {', '.join(RTX_ARCHITECTURES[1:])}. For others use --backend "
                "tensorrt, on that GPU."
            )
        if name == "sm_75":
            raise RequestError(
                "--arch sm_75: it multiplies no float32 matrices, which the VAE needs. Use sm_80 or later."
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
    """The TensorRT flavours that are installed, and can build a plan on this machine. half: say if there is none."""
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


def _check_space(folder: Path, graphs: Sequence[int], plans: Sequence[int], report: Report) -> None:
    """What the build will take, before an hour is spent on it. Raises DiskError if the disk has less.

    graphs, plans: bytes of the weights of each that is to be made.
    """
    from .plans import estimate

    peak, disk = estimate(plans)
    disk += 2 * sum(graphs) + 2**26
    if plans:
        free = available_bytes()
        report(f"about {disk / 2**30:.1f} GiB of disk and, for the largest plan, {peak / 2**30:.1f} GiB of memory")
        if free < peak:
            report(f"only {free / 2**30:.1f} GiB of memory are free: close other programs, or a plan may be killed")
    check_space(folder, disk)


def _report_profiles(found: Mapping[str, Profile], report: Report) -> None:
    report("rows that plans are built for (least, best, most):")
    for name, profile in found.items():
        unit = "timesteps" if name.endswith("_time") else "rows"
        report(f"  {name:<17}{profile.least[unit]:>6}{profile.best[unit]:>6}{profile.most[unit]:>7} {unit}")


def _report_slow(plans: Sequence[Artifact], report: Report) -> None:
    """Attention that is not one kernel, and plans that cannot be captured: slow, and no error."""
    for plan in plans:
        proof = plan.info["proof"]
        if not plan.info["capturable"]:
            name = Path(plan.info["file"]).stem
            report(f"{name}: cannot be captured in a CUDA graph; with a smaller --batch, --persons it may be")
        if proof["precision"] != "fp32" and proof["fused"] is not None and proof["fused"] < proof["attentions"]:
            name = Path(plan.info["file"]).stem
            report(f"{name}: only {proof['fused']} of {proof['attentions']} attentions are fused (heads too narrow?)")


def _verifiable(staging: Staging, checkpoint: Checkpoint, manifest: dict[str, Any]) -> list[str]:
    """The builds that this machine can compare with the reference, a whole engine or plan by plan."""
    from .verify_engine import cannot_run

    described = Manifest(staging.folder, manifest)
    small = _is_small(checkpoint)
    return [
        build.id
        for build in described.builds.values()
        if (small or build.backend in FLAVOURS) and cannot_run(described, build) is None
    ]


def _is_small(checkpoint: Checkpoint) -> bool:
    return sum(map(checkpoint.weights_bytes, checkpoint.components)) <= SMALL_BYTES


def _verify_whole(
    staging: Staging, checkpoint: Checkpoint, manifest: dict[str, Any], bisect: bool, report: Report
) -> None:
    """Every build that can run here against the reference, before it is published; the figures go into the manifest."""
    from .verify_engine import verify_engine

    small = _is_small(checkpoint)
    if not small:
        report("the whole engine is not compared with the reference: the checkpoint is too large for that")
    manifest["verified"] = {}
    manifest["seal"] = seal(manifest)  # the runtime reads no manifest without
    write_json(staging.folder / MANIFEST, manifest)
    manifest["verified"] = verify_engine(staging.folder, checkpoint, report, whole=small, bisect=bisect)
    manifest["seal"] = seal(manifest)


def main(arguments: Sequence[str] | None = None) -> int:
    given = {key: value for key, value in vars(_parser().parse_args(arguments)).items() if value is not None}
    as_json = given.pop("json")
    for key in {"backends", "only", "architectures"} & set(given):
        given[key] = tuple(given[key])

    def command() -> Outcome:
        result = build(Options(**given), reporter(as_json), progress=True)
        lines = []
        if result["complete"]:
            lines.append(
                f"{result['out']}: {result['bytes'] / 1e6:.1f} MB, {len(result['built'])} networks built and "
                f"{len(result['reused'])} parts reused in {result['seconds']} s"
            )
            for name, verified in result["verified"].items():
                if "ratio" in verified:  # else its plans were compared one by one only
                    lines.append(f"{name}: the whole engine errs {verified['ratio']:.2f} times as much as torch does")
            lines.append(f"look at it: python -m realisid_trt inspect {result['out']}")
        return Outcome(result, lines)

    return run(command, as_json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.build",
        description="Build an engine from a RealisID checkpoint: export every network, verify it, publish it.",
        epilog="""examples:
  python -m export.build                                            the miniature, into engines/miniature
  python -m export.build --checkpoint CKPT --out engines/NAME --fp16
  python -m export.build --checkpoint CKPT --fp16 --backend tensorrt-rtx --arch sm_86 sm_89 sm_120
  python -m export.build --checkpoint CKPT --only vae_decoder       one network now, the rest later
A build that was stopped goes on where it stood when the same command is given again.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder; without it: the miniature")
    add("--out", type=Path, metavar="DIR", help="engine directory (default: engines/<checkpoint's name>)")
    add("--base-model", metavar="DIR|ID", help="where unet, vae, text encoders are, if not where the checkpoint says")
    add("--variant", help="of the weight files, such as fp16")
    precision = parser.add_mutually_exclusive_group()
    for name, words in (("fp16", "half precision"), ("bf16", "bfloat16")):
        precision.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=f"{words} on GPU backends"
        )
    add(
        "--backend",
        action="append",
        dest="backends",
        metavar="NAME",
        help=f"{', '.join(BACKENDS)}; may be repeated (default: onnxruntime and every TensorRT flavour installed)",
    )
    add("--arch", nargs="+", dest="architectures", metavar="SM", help="of tensorrt-rtx plans (default: all from sm_80)")
    add("--gpu-only", action="store_true", help="build nothing for a CPU: half the disk where none will run it")
    add("--only", nargs="+", metavar="NETWORK", help="build these networks only")
    add("--batch", type=int, help="pictures of one batch that the engine must hold (default: 4)")
    add("--persons", type=int, help="persons of each picture that it must hold (default: 8)")
    add("--resolution", type=int, metavar="PX", help="longest side of a picture (default: twice the model's own)")
    add("--workspace", type=float, metavar="GIB", help="that a layer of a plan may use (default: what the GPU has)")
    add("--optimization-level", type=int, metavar="N", help="of TensorRT's builder, 0 (quick to build) to 5")
    add("--jobs", type=int, help="networks exported at a time (default: 2 for small checkpoints, else 1)")
    add("--bisect", action="store_true", help="name the first node that differs if a network fails its comparison")
    add("--face-landmarker", type=Path, metavar="FILE", help="MediaPipe's face_landmarker.task")
    add("--face-parser", type=Path, metavar="FILE", help="BiSeNet face parsing, as ONNX")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(execute(main))
