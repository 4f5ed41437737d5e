"""python -m export.build: a checkpoint → a verified engine directory. The whole road, resumable and atomic."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realisid_trt.errors import BuildError, RealisIDError, RequestError
from realisid_trt.manifest import MANIFEST, seal
from realisid_trt.verified import cache_folder

from .staging import Artifact, Staging, check_space, content_key, open_staging, write_json
from .variants import VARIANTS, Limits, Variant, artifact_name

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

LATER = ("tensorrt", "tensorrt-rtx")
SMALL_BYTES = 2**30  # weights up to this size are exported two at a time and compared in float64


@dataclass(frozen=True)
class Options:
    """What a build was asked for. The command line takes its defaults from here.

    checkpoint:      folder; None builds the miniature (random weights).
    out:             engine directory; None: engines/<name of the checkpoint's folder>.
    base_model, variant: see Checkpoint.open.
    precision:       of GPU backends: "fp32", "fp16" or "bf16". ONNX Runtime on a CPU runs float32 whatever is asked.
    backends:        which to build for.
    only:            networks to build now; the engine is complete when no network is missing.
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
    jobs: int | None = None
    face_landmarker: Path | None = None
    face_parser: Path | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Job:
    """One network to export: its artifact and key, and how many bytes of weights it reads."""

    artifact: str
    key: str
    network: str
    variant: Variant
    weights_bytes: int


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
    backends = _check_backends(options, report)
    path = options.checkpoint or miniature_checkpoint(report)
    out = options.out or Path("engines") / ("miniature" if options.checkpoint is None else path.resolve().name)

    # Behind the cheap checks: these bring torch.
    from .checkpoint import Checkpoint
    from .exporters import export_networks
    from .networks import networks
    from .parts import describe, small_parts

    checkpoint = Checkpoint.open(path, base_model=options.base_model, variant=options.variant)
    checkpoint.check_weights()
    names = {name: network.components for name, network in networks(checkpoint).items()}
    if unknown := sorted(set(options.only) - set(names)):
        raise RequestError(f"--only {' '.join(unknown)}: no such network. Known: {', '.join(names)}.")
    all_bytes = sum(map(checkpoint.weights_bytes, checkpoint.components))
    check_space(out.parent, 2 * all_bytes * len({VARIANTS[name] for name in backends}) + 2**28)

    with open_staging(out) as staging:
        made, jobs = _plan(staging, checkpoint, names, backends, options)
        if made:
            report(f"{len(made)} of {len(made) + len(jobs)} networks stand from an earlier build")
        wanted = [job for job in jobs if not options.only or job.network in options.only]
        made |= export_networks(staging, checkpoint, options, wanted, SMALL_BYTES, progress)
        built = [job.artifact for job in wanted]
        if missing := [job.artifact for job in jobs if job.artifact not in made]:
            report(f"{len(missing)} networks are still missing; the engine stays as it is. Finish without --only.")
            return {"out": str(out), "complete": False, "built": built, "missing": missing}
        made |= small_parts(staging, checkpoint, options.face_landmarker, options.face_parser)
        manifest = describe(checkpoint, made, list(names), backends)
        if staging.stands(manifest):
            manifest = staging.current
            report(f"{out} is what this command builds; nothing to do")
        else:
            _verify_whole(staging, checkpoint, manifest, all_bytes, report)
            staging.publish(manifest, list(made))
    return {
        "out": str(out),
        "complete": True,
        "built": built,
        "reused": [artifact for artifact in made if artifact not in built],
        "bytes": sum(listed["bytes"] for listed in manifest["files"].values()),
        "seconds": round(time.perf_counter() - start, 1),
        "verified": manifest["verified"],
    }


def miniature_checkpoint(report: Report) -> Path:
    """The checkpoint built without --checkpoint: the miniature with random weights, made once."""
    from .miniature import make_checkpoint

    folder = cache_folder() / "checkpoints" / "miniature"
    if not (folder / "model_index.json").is_file():
        report(f"making the miniature checkpoint (random weights) in {folder}")
        make_checkpoint(folder, seed=0)
    return folder


def _check_backends(options: Options, report: Report) -> tuple[str, ...]:
    for name in options.backends:
        if name in LATER:
            raise BuildError(f"--backend {name}: this version builds no TensorRT plans yet. Use --backend onnxruntime.")
        if name not in VARIANTS:
            raise RequestError(f"--backend {name} is unknown. Known: {', '.join(VARIANTS)}.")
    if options.precision != "fp32" and set(options.backends) == {"onnxruntime"}:
        report(f"ONNX Runtime on a CPU runs float32: --{options.precision} changes nothing for backend onnxruntime.")
    return tuple(dict.fromkeys(options.backends))


def _plan(
    staging: Staging,
    checkpoint: Checkpoint,
    components_of: dict[str, tuple[str, ...]],
    backends: Sequence[str],
    options: Options,
) -> tuple[dict[str, Artifact], list[Job]]:
    """The networks that stand, by artifact, and the jobs that make the others."""
    from .parts import sources, versions

    made, jobs = {}, {}
    makers = sources("networks.py", "to_onnx.py", "variants.py", "verify.py")
    for backend in backends:
        variant = VARIANTS[backend]
        for name, components in components_of.items():
            artifact = artifact_name(name, variant)
            weights = {component: checkpoint.weights_key(component) for component in components}
            key = content_key(name, variant.name, asdict(options.limits), weights, makers, versions())
            if found := staging.find(artifact, key):
                made[artifact] = found
            else:
                size = sum(map(checkpoint.weights_bytes, components))
                jobs[artifact] = Job(artifact, key, name, variant, size)
    return made, list(jobs.values())


def _verify_whole(
    staging: Staging, checkpoint: Checkpoint, manifest: dict[str, Any], all_bytes: int, report: Report
) -> None:
    """The whole engine against the reference, before it is published; the figures go into the manifest."""
    manifest["verified"] = None
    if all_bytes > SMALL_BYTES:
        report("the whole engine was not compared with the reference: the checkpoint is too large for float64 here")
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

    def report(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    try:
        if given.get("jobs", 1) < 1:
            raise RequestError(f"--jobs is {given['jobs']}, expected at least 1.")
        result = build(Options(**given), report, progress=True)
    except RealisIDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped. The same command goes on where it stood.", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(result))
    elif result["complete"]:
        report(
            f"{result['out']}: {result['bytes'] / 1e6:.1f} MB, {len(result['built'])} networks built and "
            f"{len(result['reused'])} parts reused in {result['seconds']} s"
        )
        if verified := result["verified"]:
            report(f"the whole engine errs {verified['ratio']:.2f} times as much as float32 torch, against float64")
        report(f"look at it: python -m realisid_trt inspect {result['out']}")
    return 0


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
    add("--jobs", type=int, help="networks exported at a time (default: 2 for small checkpoints, else 1)")
    add("--face-landmarker", type=Path, metavar="FILE", help="MediaPipe's face_landmarker.task")
    add("--face-parser", type=Path, metavar="FILE", help="BiSeNet face parsing, as ONNX")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
