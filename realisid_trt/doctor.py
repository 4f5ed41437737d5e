"""`doctor`: what this machine can run, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Any

from .backends import KNOWN, installed, open_backend
from .errors import RealisIDError
from .manifest import Manifest
from .verified import cache_folder

EXPORT = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "tflite")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: "ok", "missing" (something needed cannot run) or "optional" (absent, not needed)."""

    what: str
    state: str
    detail: str
    mend: str = ""


def examine(engine: str) -> tuple[dict[str, Any], list[str], int]:
    """Findings as JSON values and as lines; status 1 if no picture could be made with the engine here."""
    findings = [_python(), *_backends(), _gpu(), _export(), _mediapipe(), _cache(), _engine(engine)]
    marks = {"ok": "ok      ", "missing": "MISSING ", "optional": "optional"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]}  {finding.what}: {finding.detail}")
        if finding.mend:
            lines.append(f"          {finding.mend}")
    healthy = all(finding.state != "missing" for finding in findings)
    lines.append(
        "This machine can make pictures." if healthy else "This machine cannot make pictures yet: see MISSING."
    )
    return {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}, lines, 0 if healthy else 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "no version"


def _python() -> Finding:
    import cv2
    import numpy as np
    import PIL

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = (
        f"Python {platform.python_version()} on {platform.machine()} {platform.system()}, {cores} cores, "
        f"numpy {np.__version__}, opencv {cv2.__version__}, pillow {PIL.__version__}"
    )
    return Finding("python", "ok" if sys.version_info >= (3, 11) else "missing", detail)


def _backends() -> list[Finding]:
    findings = []
    for name, (_, package, extra) in KNOWN.items():
        if not installed(name):
            findings.append(
                Finding(
                    f"backend {name}", "missing", f"{package} is not installed", f"pip install 'realisid_trt[{extra}]'"
                )
            )
            continue
        import onnxruntime

        providers = ", ".join(onnxruntime.get_available_providers())
        findings.append(
            Finding(f"backend {name}", "ok", f"onnxruntime {onnxruntime.__version__} ({providers}), on the CPU")
        )
    return findings


def _gpu() -> Finding:
    """NVIDIA's driver, asked through cuda-bindings when installed: cuInit fails cleanly without a driver."""
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"):
        from cuda.bindings import driver

        try:
            (status,) = driver.cuInit(0)
            _, count = driver.cuDeviceGetCount()
            return Finding("NVIDIA GPU", "ok", f"{count} found; this version runs on the CPU ({status.name})")
        except Exception as error:  # cuda-bindings' own exception when there is no libcuda
            return Finding(
                "NVIDIA GPU", "optional", f"no driver ({type(error).__name__}); not needed for backend onnxruntime"
            )
    found = shutil.which("nvidia-smi")
    detail = (
        "nvidia-smi is here, but this version runs on the CPU"
        if found
        else "none found; not needed for backend onnxruntime"
    )
    return Finding("NVIDIA GPU", "optional", detail)


def _export() -> Finding:
    absent = [package for package in EXPORT if importlib.util.find_spec(package) is None]
    if absent:
        return Finding(
            "building engines", "optional", f"{', '.join(absent)} not installed; not needed to run engines",
            "pip install 'realisid_trt[cpu,export]'",
        )  # fmt: skip
    return Finding("building engines", "ok", ", ".join(f"{package} {_version(package)}" for package in EXPORT))


def _mediapipe() -> Finding:
    if importlib.util.find_spec("mediapipe") is None:
        return Finding("mediapipe", "optional", "not installed; only for running a face_landmarker.task as it is")
    return Finding("mediapipe", "ok", _version("mediapipe"))


def _cache() -> Finding:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if not os.access(existing, os.W_OK):
        return Finding(
            "cache", "optional", f"{folder} cannot be written: hashes are computed at every start",
            "set XDG_CACHE_HOME to a folder of yours",
        )  # fmt: skip
    return Finding("cache", "ok", f"{folder}, {free:.1f} GB free")


def _engine(path: str) -> Finding:
    try:
        manifest = Manifest.read(path)
        manifest.check_files()
        backend = open_backend("auto", manifest)
    except RealisIDError as error:
        return Finding("engine", "missing", str(error))
    return Finding("engine", "ok", f"{manifest.path}, every file verified, runs on {backend.name} ({backend.device})")
