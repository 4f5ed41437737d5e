"""python -m export.build: a checkpoint → a verified engine directory. The whole road, resumable and atomic."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realisid_trt.command_line import Outcome, reporter, run
from realisid_trt.errors import BuildError, RequestError
from realisid_trt.files import cache_folder
from realisid_trt.manifest import MANIFEST, seal

from .files import check_space, target_folder, write_json
from .forms import BACKENDS, Limits, Target, artifact_name, targets_of
from .staging import Artifact, Staging, content_key, open_staging

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .networks import Network
    from .workers import Job

LATER = ("tensorrt", "tensorrt-rtx")
SMALL_BYTES = 2**30  # checkpoints up to this size are compared as a whole with the reference


@dataclass(frozen=True)
class Options:
    """What a build was asked for. The command line takes its defaults from here.

    checkpoint:      folder; None builds the miniature (random weights).
    out:             engine directory; None: engines/<name of the checkpoint's folder>.
    base_model, variant: see Checkpoint.open.
    precision:       of GPU backends: "fp32", "fp16" or "bf16". ONNX Runtime on a CPU runs float32 whatever is asked.
    backends:        which to build for.
    only:            networks to build now; the engine is complete when no network is missing.
    batch, persons:  pictures of one batch, and persons of each, that the engine must hold.
    resolution:      longest side of a picture, px; None: twice the model's own.
    jobs:            networks exported at a time; None: 2 for small checkpoints, else 1.
    face_landmarker: MediaPipe's face_landmarker.task, converted and used instead of the mesh of the wheel.
    face_parser:     BiSeNet face parsing as ONNX.
    """

    checkpoint: Path | None = None
    out: Path | None = None
    base_model: str | None = None
    variant: str | None = None
    precision: str = "fp32"
    backends: tuple[str, ...] = ("onnxruntime",)
    only: tuple[str, ...] = ()
    batch: int = 4
    persons: int = 8
    resolution: int | None = None
    jobs: int | None = None
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
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two exporting processes must not spin against each other
    targets = _check(options, report)
    path = options.checkpoint or miniature_checkpoint(report)
    name = "miniature" if options.checkpoint is None else Path(os.path.realpath(path)).name
    asked = options.out or Path("engines") / name
    out = target_folder(asked)

    # Behind the cheap checks: these bring torch.
    from .checkpoint import Checkpoint
    from .describe import describe
    from .networks import networks
    from .origins import remember
    from .small_parts import kernel_pack, small_parts
    from .workers import export_all

    checkpoint = Checkpoint.open(path, base_model=options.base_model, variant=options.variant)
    checkpoint.check_weights()
    known = networks(checkpoint)
    if unknown := sorted(set(options.only) - set(known)):
        raise RequestError(f"--only {' '.join(unknown)}: no such network. Known: {', '.join(known)}.")

    with open_staging(out) as staging:
        made, jobs = _plan(staging, checkpoint, known, targets, options)
        if made:
            report(f"{len(made)} of {len(made) + len(jobs)} networks stand from an earlier build")
        wanted = [job for job in jobs if not options.only or job.network in options.only]
        check_space(out.parent, 2 * sum(job.bytes for job in wanted) + 2**26)
        made |= export_all(staging, wanted, options.jobs, progress)
        built = [job.artifact for job in wanted]
        if missing := [job.artifact for job in jobs if job.artifact not in made]:
            report(f"{len(missing)} networks are still missing; the engine stays as it is. Finish without --only.")
            return {"out": str(asked), "complete": False, "built": built, "missing": missing}
        made |= small_parts(staging, checkpoint, options.face_landmarker, options.face_parser)
        if any(target.device == "cuda" for target in targets):
            made |= kernel_pack(staging)
        manifest = describe(checkpoint, made, list(known), targets)
        if staging.stands(manifest):
            manifest = staging.current
            report(f"{asked} is what this command builds; nothing to do")
        else:
            _verify_whole(staging, checkpoint, manifest, report)
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


def miniature_checkpoint(report: Report) -> Path:
    """The checkpoint built without --checkpoint: the miniature, random weights, made once per version of its maker."""
    from .miniature import make_checkpoint, miniature_key

    folder = cache_folder() / "checkpoints" / f"miniature-{miniature_key()[:12]}"
    if not (folder / "model_index.json").is_file():
        report(f"making the miniature checkpoint (random weights) in {folder}")
        make_checkpoint(folder, seed=0)
    return folder


def _check(options: Options, report: Report) -> list[Target]:
    """What to build."""
    for name in options.backends:
        if name in LATER:
            raise BuildError(f"--backend {name}: this version builds no TensorRT plans yet. Use --backend onnxruntime.")
        if name not in BACKENDS:
            raise RequestError(f"--backend {name} is unknown. Known: {', '.join(BACKENDS)}.")
    for flag in ("batch", "persons", "resolution", "jobs"):
        value = getattr(options, flag)
        if value is not None and value < (0 if flag == "persons" else 1):
            raise RequestError(f"--{flag} is {value}, expected at least {0 if flag == 'persons' else 1}.")
    if options.precision == "bf16" and "onnxruntime" in options.backends:
        report("ONNX Runtime has no bfloat16 convolutions: --bf16 changes nothing for it. For a GPU use --fp16.")
    if options.precision == "fp16" and "onnxruntime" in options.backends:
        report("ONNX Runtime on a CPU runs float32: its networks are built too; those in float16 are for a GPU.")
    return [target for name in dict.fromkeys(options.backends) for target in targets_of(name, options.precision)]


def _plan(
    staging: Staging, checkpoint: Checkpoint, known: Mapping[str, Network], targets: Sequence[Target], options: Options
) -> tuple[dict[str, Artifact], list[Job]]:
    """The networks that stand, by artifact, and the jobs that make the others."""
    from .describe import sources, versions
    from .to_onnx import port
    from .workers import Job

    limits = _limits(checkpoint, options)
    makers = sources("networks.py", "to_onnx.py", "forms.py", "exact.py", "verify.py", "workers.py", "checkpoint")
    source = checkpoint.path, options.base_model, options.variant
    made: dict[str, Artifact] = {}
    jobs: dict[str, Job] = {}
    for target in targets:
        for name, network in known.items():
            form = target.form_of(name)
            artifact = artifact_name(name, form)
            if artifact in made or artifact in jobs:  # of another target
                continue
            # Shapes come from other components too: the canvas from the UNet, the tokens from the projection.
            ports = [port(tap, form, limits) for tap in (*network.inputs, *network.outputs)]
            weights = {component: checkpoint.weights_key(component) for component in network.components}
            family = checkpoint.has_added_conditions  # which layer of a text encoder is read
            key = content_key(name, form.name, ports, weights, family, makers, versions())
            if found := staging.find(artifact, key):
                made[artifact] = found
            else:
                size = sum(map(checkpoint.weights_bytes, network.components))
                jobs[artifact] = Job(artifact, key, source, name, form, limits, size)
    return made, list(jobs.values())


def _limits(checkpoint: Checkpoint, options: Options) -> Limits:
    coarsest_px = checkpoint.vae_scale_factor << (checkpoint.levels - 1)
    own_px = checkpoint.sample_size * checkpoint.vae_scale_factor
    longest_px = options.resolution or 2 * own_px
    if longest_px < own_px:
        raise RequestError(f"--resolution is {longest_px} px, expected at least the model's own {own_px} px.")
    return Limits.of_requests(options.batch, options.persons, longest_px // coarsest_px)


def _verify_whole(staging: Staging, checkpoint: Checkpoint, manifest: dict[str, Any], report: Report) -> None:
    """The whole engine against the reference, before it is published; the figures go into the manifest."""
    manifest["verified"] = None
    if sum(map(checkpoint.weights_bytes, checkpoint.components)) > SMALL_BYTES:
        report("the whole engine was not compared with the reference: the checkpoint is too large for that here")
    else:
        from .verify_engine import verify_engine

        manifest["seal"] = seal(manifest)  # the runtime reads no manifest without
        write_json(staging.folder / MANIFEST, manifest)
        manifest["verified"] = verify_engine(staging.folder, checkpoint)
    manifest["seal"] = seal(manifest)


def main(arguments: Sequence[str] | None = None) -> int:
    given = {key: value for key, value in vars(_parser().parse_args(arguments)).items() if value is not None}
    as_json = given.pop("json")
    for key in {"backends", "only"} & set(given):
        given[key] = tuple(given[key])

    def command() -> Outcome:
        result = build(Options(**given), reporter(as_json), progress=True)
        lines = []
        if result["complete"]:
            lines.append(
                f"{result['out']}: {result['bytes'] / 1e6:.1f} MB, {len(result['built'])} networks built and "
                f"{len(result['reused'])} parts reused in {result['seconds']} s"
            )
            if verified := result["verified"]:
                lines.append(f"the whole engine errs {verified['ratio']:.2f} times as much as torch in float32")
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
    add("--backend", action="append", dest="backends", metavar="NAME", help="may be repeated (default: onnxruntime)")
    add("--only", nargs="+", metavar="NETWORK", help="build these networks only")
    add("--batch", type=int, help="pictures of one batch that the engine must hold (default: 4)")
    add("--persons", type=int, help="persons of each picture that it must hold (default: 8)")
    add("--resolution", type=int, metavar="PX", help="longest side of a picture (default: twice the model's own)")
    add("--jobs", type=int, help="networks exported at a time (default: 2 for small checkpoints, else 1)")
    add("--face-landmarker", type=Path, metavar="FILE", help="MediaPipe's face_landmarker.task")
    add("--face-parser", type=Path, metavar="FILE", help="BiSeNet face parsing, as ONNX")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
