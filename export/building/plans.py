"""The plans of a build. Each is built in a process of its own, so that a crash loses only one plan."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

import realisid_trt.errors
from realisid_trt.errors import BuildError, RealisIDError
from realisid_trt.machine import available_bytes

from ..files import disk_errors
from ..to_plan import PlanSettings, Shapes, to_plan
from .processes import belong_to
from .staging import Artifact, Staging

# Measured on SDXL's networks, TensorRT-RTX 1.7: a builder takes up to PEAK_PER_WEIGHT × the weights, plus PEAK_BYTES.
PEAK_PER_WEIGHT, PEAK_BYTES = 3.6, 2**29
PLAN_PER_WEIGHT, PLAN_BYTES = 1.05, 2**24
TELL_SECONDS, CANCEL_SECONDS = 0.2, 20.0
DONE, FAILED, TOLD = "done", "failed", "told"


@dataclass(frozen=True)
class PlanJob:
    """One plan to build.

    artifact, key: its name and key in the staging folder.
    onnx_file:     the graph, absolute.
    file:          the plan, inside the engine directory.
    bytes:         of weights.
    info:          for the manifest, beside the results of the build.
    """

    artifact: str
    key: str
    network: str
    onnx_file: Path
    file: Path
    shapes: Shapes
    settings: PlanSettings
    bytes: int
    info: Mapping[str, Any]


def estimate(weights_bytes: Sequence[int]) -> tuple[int, int]:
    """Bytes of memory that the largest of these plans needs while it is built, and of disk that all of them take."""
    peak = max(weights_bytes, default=0) * PEAK_PER_WEIGHT + PEAK_BYTES
    return int(peak), int(sum(weights_bytes) * PLAN_PER_WEIGHT + PLAN_BYTES * len(weights_bytes))


def build_plans(staging: Staging, jobs: Sequence[PlanJob], progress: bool) -> dict[str, Artifact]:
    """Builds the plans, largest first. Returns the artifacts by name.

    Each is stored as soon as it is built and proven. A failure does not stop the others; at the end BuildError names
    every network that failed, with the reason. Ctrl-C cancels the builder at its next step.
    """
    if not jobs:
        return {}
    made: dict[str, Artifact] = {}
    failures: list[RealisIDError] = []
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=1.0, desc="plans", disable=not progress, bar_format=layout)
    whole = sum(job.bytes + PLAN_BYTES for job in jobs)
    before = 0.0
    with bar:
        for job in sorted(jobs, key=lambda job: -job.bytes):
            share = (job.bytes + PLAN_BYTES) / whole

            def tell(done: float, phase: str, job: PlanJob = job, share: float = share, start: float = before) -> None:
                bar.set_postfix_str(f"{job.network}: {phase}", refresh=False)
                bar.update(max(0.0, start + done * share - bar.n))

            folder = staging.workspace(job.artifact.replace(":", "-").replace("/", "-"))
            try:
                info = _in_a_process(job, folder, tell)
                made[job.artifact] = staging.add(job.artifact, job.key, folder, {**job.info, **info})
            except BuildError as error:
                failures.append(error)
            before += share
            tell(0.0, "done", start=before)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise BuildError(f"{len(failures)} plans could not be built. " + " | ".join(map(str, failures)))
    return made


def _in_a_process(job: PlanJob, folder: Path, tell: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_build, args=(os.getpid(), job, folder, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            try:
                kind, *what = ours.recv()
            except EOFError:  # the process died
                process.join()
                raise BuildError(_death(job, process.exitcode)) from None
            if kind == TOLD:
                tell(*what)
            elif kind == FAILED:
                name, text = what
                raise getattr(realisid_trt.errors, name, BuildError)(text)
            else:
                process.join()
                info: dict[str, Any] = what[0]
                return info
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the process has just ended
            ours.send("cancel")
            process.join(CANCEL_SECONDS)
        raise
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


def _death(job: PlanJob, exitcode: int | None) -> str:
    needed, _ = estimate([job.bytes])
    if exitcode is None or exitcode >= 0:
        return f"{job.network}: the process that built its plan ended silently with status {exitcode}. Report this."
    how = f"signal {-exitcode}"
    return (
        f"{job.network}: the process that built its {job.settings.flavour} plan died ({how}); most often the system "
        f"was out of memory: about {needed / 2**30:.1f} GiB are needed, {available_bytes() / 2**30:.1f} GiB are free "
        "now. Close other programs and run the same command again: what was finished is kept."
    )


def _build(parent: int, job: PlanJob, folder: Path, pipe: Connection) -> None:
    """The work of the process: builds one plan and reports through the pipe."""
    belong_to(parent)
    last = 0.0

    def watch(share: float, phase: str) -> bool:
        nonlocal last
        if time.monotonic() - last > TELL_SECONDS:
            last = time.monotonic()
            pipe.send((TOLD, share, phase))
        return not pipe.poll()  # any message means: stop

    plan = folder / job.file
    try:
        with disk_errors(folder):
            plan.parent.mkdir(parents=True, exist_ok=True)
            built = to_plan(job.onnx_file, plan, job.network, job.shapes, job.settings, watch)
    except RealisIDError as error:
        pipe.send((FAILED, type(error).__name__, str(error)))
    except Exception as error:  # a bug of ours, or of an untested TensorRT
        words = f"{type(error).__name__}: {error}"
        pipe.send((FAILED, "BuildError", f"{job.network}: {words}. Report this, with the installed versions."))
    else:
        facts = {"build_seconds": built.seconds, "peak_bytes": built.peak_bytes, "capturable": built.capturable}
        pipe.send((DONE, {"proof": built.proof.as_json(), **facts}))
