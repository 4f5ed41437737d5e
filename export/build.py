"""python -m export.build: a checkpoint → a verified engine directory. Resumable and atomic."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realisid_trt.backends.tensorrt_flavours import FLAVOURS
from realisid_trt.commands.command_line import Outcome, execute, reporter, run
from realisid_trt.commands.memory_table import amount, memory_lines, present_card, sizes_of
from realisid_trt.errors import BuildError, CheckpointError, RequestError
from realisid_trt.loop.denoise import loop_networks
from realisid_trt.machine import available_bytes, unsupported
from realisid_trt.manifest import MANIFEST, Manifest, seal
from realisid_trt.memory import gpu_builds, needs

from .building.staging import Staging, open_staging
from .files import check_space, target_folder, write_json
from .options import Options, Report, checked, parser

if TYPE_CHECKING:
    from .building.staging import Artifact
    from .checkpoint import Checkpoint
    from .forms import Target
    from .networks import Network
    from .profiles import Profile

SMALL_BYTES = 2**30  # checkpoints up to this size are compared as a whole with the reference


def build(options: Options, report: Report = lambda line: None, progress: bool = False) -> dict[str, Any]:
    """Builds, verifies and publishes an engine. Returns the result as JSON values.

    report:   called with each line of text for people.
    progress: draw a bar on stderr.

    Raises BuildError, ParityError, DiskError or CheckpointError; the previous engine is then untouched, and the same
    command continues where it stopped.
    """
    start = time.perf_counter()
    if problem := unsupported():
        raise BuildError(problem)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two exporting processes must not wait by spinning
    targets, options = checked(options, report)
    path = options.checkpoint or miniature_checkpoint()
    name = Path(os.path.realpath(path)).name
    asked = options.out or Path("engines") / name
    out = target_folder(asked)

    # Imported after the cheap checks, since these modules import torch.
    from .building.describe import describe
    from .building.origins import remember
    from .building.planning import onnx_jobs, plan_jobs, profiles_of
    from .building.plans import build_plans
    from .building.small_parts import kernel_pack, small_parts
    from .building.workers import export_all
    from .checkpoint import Checkpoint
    from .networks import networks

    checkpoint = Checkpoint.open(path, base_model=options.base_model, variant=options.variant)
    checkpoint.check_weights()
    known = networks(checkpoint)
    if unknown := sorted(set(options.only) - set(known)):
        raise RequestError(f"--only {' '.join(unknown)}: no such network. Known: {', '.join(known)}.")

    _report_weights(checkpoint, known, targets, report)
    with_plans = any(target.has_plans for target in targets)
    if with_plans:
        _report_profiles(profiles_of(checkpoint, known, options), report)

    with open_staging(out) as staging:
        made, jobs = onnx_jobs(staging, checkpoint, known, targets, options)
        to_build = [(target, name) for target in targets if target.has_plans for name in options.only or known]
        if made:
            report(f"{len(made)} of {len(made) + len(jobs)} networks are kept from an earlier build")
        wanted = [job for job in jobs if not options.only or job.network in options.only]
        # Which plans are up to date is known only after the graphs are made.
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
        manifest = describe(checkpoint, made, list(known), targets, options.architectures, largest(checkpoint, options))
        if staging.stands(manifest, _verifiable(staging, checkpoint, manifest)):
            manifest = staging.current
            report(f"{asked} is up to date; nothing to do")
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
        "memory": _memory(Manifest(out, manifest), report),
    }


def miniature_checkpoint() -> Path:
    """The checkpoint of a build without --checkpoint: the trained miniature. Raises CheckpointError without it."""
    folder = Path(__file__).resolve().parents[1] / "checkpoints" / "miniature"
    if not folder.is_dir():
        raise CheckpointError(
            f"no --checkpoint is given, and the trained miniature is not in {folder}: it is part of the source tree "
            "and not of an installed package. Name your own, or make one with random weights: "
            "python -m export.miniature --out CKPT."
        )
    return folder


def _check_space(folder: Path, graphs: Sequence[int], plans: Sequence[int], report: Report) -> None:
    """Reports the disk and memory that the build needs, before an hour is spent on it.

    graphs, plans: bytes of the weights of each that is to be made.

    Raises DiskError if the disk has less.
    """
    from .building.plans import estimate

    peak, disk = estimate(plans)
    disk += 2 * sum(graphs) + 2**26
    if plans:
        free = available_bytes()
        report(f"about {disk / 2**30:.1f} GiB of disk and, for the largest plan, {peak / 2**30:.1f} GiB of memory")
        if free < peak:
            report(f"only {free / 2**30:.1f} GiB of memory are free: close other programs, or a builder may be killed")
    check_space(folder, disk)


def _report_profiles(found: Mapping[str, Profile], report: Report) -> None:
    report("rows that plans are built for (least, best, most):")
    for name, profile in found.items():
        unit = "timesteps" if name.endswith("_time") else "rows"
        report(f"  {name:<17}{profile.least[unit]:>6}{profile.best[unit]:>6}{profile.most[unit]:>7} {unit}")
    if tokens := [str(sizes["tokens"]) for sizes in (profile.least, profile.best, profile.most) if "tokens" in sizes]:
        report(f"tokens of text and IDs (least, best, most): {', '.join(tokens)}")


def _report_weights(
    checkpoint: Checkpoint, known: Mapping[str, Network], targets: Sequence[Target], report: Report
) -> None:
    """Reports the GPU memory that the weights will take, before they are built."""
    for target in targets:
        if target.device == "cuda":
            sizes = {
                name: network.elements(checkpoint) * target.form_of(name).itemsize for name, network in known.items()
            }
            loop = sum(sizes.get(name, 0) for name in loop_networks(checkpoint.config.table))
            report(
                f"{target.build}: {amount(loop)} of weights on a GPU for the networks of every step, "
                f"{amount(sum(sizes.values()) - loop)} for the others"
            )


def largest(checkpoint: Checkpoint, options: Options) -> dict[str, int]:
    """The largest batch, persons and resolution (px) of a request that the engine will hold."""
    coarsest_px = checkpoint.vae_scale_factor << (checkpoint.levels - 1)
    longest_px = options.resolution or 2 * checkpoint.sample_size * checkpoint.vae_scale_factor
    resolution = longest_px // coarsest_px * coarsest_px
    return {"batch": options.batch, "persons": options.persons, "resolution": resolution}


def _memory(manifest: Manifest, report: Report) -> list[dict[str, Any]]:
    """Reports the GPU memory that requests will need, of one picture and of the largest batch. Returns it as JSON."""
    sizes = sizes_of(manifest)
    for line in memory_lines(manifest, sizes, present_card()):
        report(line)
    return [needs(manifest, build, size).as_json() for build in gpu_builds(manifest) for size in sizes]


def _report_slow(plans: Sequence[Artifact], report: Report) -> None:
    """Reports attention that is not fused, and plans that cannot be captured: both are slow, but not errors."""
    for plan in plans:
        proof = plan.info["proof"]
        if not plan.info["capturable"]:
            name = Path(plan.info["file"]).stem
            report(f"{name}: cannot be captured in a CUDA graph; a smaller --batch or --persons may help")
        if proof["precision"] != "fp32" and proof["fused"] is not None and proof["fused"] < proof["attentions"]:
            name = Path(plan.info["file"]).stem
            report(f"{name}: only {proof['fused']} of {proof['attentions']} attentions are fused (heads too narrow?)")


def _verifiable(staging: Staging, checkpoint: Checkpoint, manifest: dict[str, Any]) -> list[str]:
    """The builds that this machine can compare with the reference, as a whole engine or plan by plan."""
    from .truth.verify_engine import cannot_run

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
    """Compares every build that can run here with the reference, and puts the figures into the manifest."""
    from .truth.verify_engine import verify_engine

    small = _is_small(checkpoint)
    if not small:
        report("the whole engine is not compared with the reference: the checkpoint is too large for that")
    manifest["verified"] = {}
    manifest["seal"] = seal(manifest)  # the runtime reads only sealed manifests
    write_json(staging.folder / MANIFEST, manifest)
    manifest["verified"] = verify_engine(staging.folder, checkpoint, report, whole=small, bisect=bisect)
    manifest["seal"] = seal(manifest)


def main(arguments: Sequence[str] | None = None) -> int:
    given = {key: value for key, value in vars(parser().parse_args(arguments)).items() if value is not None}
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
                    lines.append(f"{name}: the whole engine has {verified['ratio']:.2f} times torch's error")
            lines.append(f"look at it: python -m realisid_trt inspect {result['out']}")
        return Outcome(result, lines)

    return run(command, as_json)


if __name__ == "__main__":
    sys.exit(execute(main))
