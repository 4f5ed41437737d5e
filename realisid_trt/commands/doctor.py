"""`doctor`: what this machine can run, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass

from ..backends import KNOWN, installed, open_backend
from ..errors import RealisIDError
from ..files import cache_folder
from ..machine import available_cores, unsupported
from ..manifest import Manifest
from ..memory import gpu_builds, needs
from ..persons.containers import PLUGINS, can_read
from .command_line import Outcome
from .memory_table import amount, at_least, fits, present_card, sizes_of, verdict

EXPORT = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "tflite")


@dataclass(frozen=True)
class Finding:
    """The result of one check. state: "ok", "missing" (needed and unusable) or "optional" (absent, not needed)."""

    what: str
    state: str
    detail: str
    mend: str = ""


def examine(
    engine: str, batch: int | None = None, persons: int | None = None, resolution: int | None = None
) -> Outcome:
    """The findings as JSON values and as lines; status 1 if the engine cannot make pictures here.

    batch, persons, resolution: the size for which GPU memory is counted.
    """
    runs = _engine(engine)
    findings = [
        _system(),
        _python(),
        *_backends(runs.state == "ok"),
        _gpu(),
        _export(),
        _photos(),
        _mediapipe(),
        _cache(),
        runs,
        *_memory(engine, batch, persons, resolution),
    ]
    lines = []
    for finding in findings:
        mark = "MISSING" if finding.state == "missing" else finding.state
        lines.append(f"{mark:<10}{finding.what}: {finding.detail}")
        if finding.mend:
            lines.append(f"{'':<10}{finding.mend}")
    healthy = all(finding.state != "missing" for finding in findings)
    lines.append("This machine can make pictures." if healthy else "This machine cannot make pictures: see MISSING.")
    values = {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}
    return Outcome(values, lines, 0 if healthy else 1)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "no version"


def _system() -> Finding:
    problem = unsupported()
    detail = f"{platform.system()} on {platform.machine()}"
    return Finding("system", "ok", detail) if problem is None else Finding("system", "missing", detail, problem)


def _python() -> Finding:
    import cv2
    import numpy as np
    import PIL

    detail = (
        f"Python {platform.python_version()} on {platform.machine()} {platform.system()}, {available_cores()} cores, "
        f"numpy {np.__version__}, opencv {cv2.__version__}, pillow {PIL.__version__}"
    )
    return Finding("python", "ok" if sys.version_info >= (3, 11) else "missing", detail)


def _backends(runs: bool) -> list[Finding]:
    """runs: whether the engine runs with the installed backends."""
    findings = []
    for name, (module, package, extra) in KNOWN.items():
        mend = f"pip install 'realisid_trt[{extra}]'"
        # An engine that runs needs no other backend. For one that does not, onnxruntime counts: every machine can use
        # it.
        absent = "missing" if name == "onnxruntime" and not runs else "optional"
        if not installed(name):
            findings.append(Finding(f"backend {name}", absent, f"{package} is not installed", mend))
            continue
        try:
            detail = importlib.import_module(f"..backends.{module}", __package__).describe(name)
            findings.append(Finding(f"backend {name}", "ok", detail))
        except RealisIDError as error:
            findings.append(Finding(f"backend {name}", absent, str(error)))
    return findings


def _gpu() -> Finding:
    try:
        from ..backends.gpu_facts import gpu_facts

        facts = gpu_facts()
        detail = f"{facts.name}, {facts.architecture}, {facts.sms} multiprocessors, driver for CUDA {facts.cuda}"
        return Finding("NVIDIA GPU", "ok", detail)
    except RealisIDError as error:
        return Finding("NVIDIA GPU", "optional", f"none; not needed to run on the CPU ({error})")


def _export() -> Finding:
    absent = [package for package in EXPORT if importlib.util.find_spec(package) is None]
    if absent:
        detail = f"{', '.join(absent)} not installed; not needed to run engines"
        return Finding("building engines", "optional", detail, "pip install 'realisid_trt[cpu,export]'")
    return Finding("building engines", "ok", ", ".join(f"{package} {_version(package)}" for package in EXPORT))


def _photos() -> Finding:
    """Photo formats that need a newer Pillow or a plugin package."""
    absent = [plugin.package for plugin in PLUGINS if not can_read(plugin.format)]
    if absent:
        detail = f"JPEG, PNG, WebP, TIFF and others are read; more formats need {', '.join(absent)}"
        return Finding("photos", "optional", detail, f"pip install {' '.join(absent)}")
    return Finding("photos", "ok", f"{', '.join(plugin.format for plugin in PLUGINS)} too")


def _mediapipe() -> Finding:
    if importlib.util.find_spec("mediapipe") is None:
        return Finding("mediapipe", "optional", "not installed; needed only to run a face_landmarker.task unconverted")
    return Finding("mediapipe", "ok", _version("mediapipe"))


def _cache() -> Finding:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if not os.access(existing, os.W_OK):
        detail = f"{folder} cannot be written: files are hashed at every start"
        return Finding("cache", "optional", detail, "set XDG_CACHE_HOME to a folder of yours")
    return Finding("cache", "ok", f"{folder}, {free:.1f} GB free")


def _engine(path: str) -> Finding:
    try:
        manifest = Manifest.read(path)
        manifest.check_files()
        backend = open_backend("auto", manifest, networks=())
    except RealisIDError as error:
        return Finding("engine", "missing", str(error))
    return Finding("engine", "ok", f"{manifest.path}, every file verified, runs on {backend.name} ({backend.device})")


def _memory(path: str, batch: int | None, persons: int | None, resolution: int | None) -> list[Finding]:
    """The GPU memory that the engine's builds for a GPU need; nothing for an engine that cannot be read."""
    try:
        manifest = Manifest.read(path)
    except RealisIDError:
        return []
    card, findings = present_card(), list[Finding]()
    for build in gpu_builds(manifest):
        try:
            [size, *_] = sizes_of(manifest, batch, persons, resolution)
            found = needs(manifest, build, size)
        except RealisIDError as error:  # more than the engine was built for: the other findings are still told
            findings.append(Finding(f"GPU memory, {build.id}", "optional", str(error), ""))
            continue
        detail = (
            f"{size}: {at_least(found, found.normal)}, of them {amount(found.loop_weights)} weights of every step and "
            f'{amount(found.other_weights)} other weights; with memory="low" {at_least(found, found.low)}; '
            f"{verdict(found, card)}"
        )
        small = card is not None and not fits(found.normal, card.nbytes)
        mend = f"python -m realisid_trt inspect {shlex.quote(path)} shows each part" if small else ""
        findings.append(Finding(f"GPU memory, {build.id}", "optional" if small else "ok", detail, mend))
    return findings
