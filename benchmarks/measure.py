"""Shared by all measurements: the order of runs, percentiles, and the facts that every figure needs beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from realisid_trt.machine import available_cores

T = TypeVar("T")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")
CUDA = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")
EXPORTERS = ("onnx", "onnxscript", "tflite", "accelerate")
PACKAGES = ("realisid_trt", *RUNTIMES, "torch", "diffusers", "transformers", "numpy", *CUDA, *EXPORTERS)
STAT = Path("/proc/stat")  # Linux


@dataclass(frozen=True, eq=False)
class Run:
    """One picture, made and timed.

    total_ms:  from the call to the picture.
    stages:    milliseconds by stage; "a.b" is a part of "a".
    step_ms:   milliseconds of each denoising step.
    rows:      rows that each network evaluated.
    step_rows: the same of each denoising step.
    latents:   (1, C, h, w) float32, the final ones.
    cores:     that the process lacked meanwhile, see `timed`.
    """

    total_ms: float
    stages: Mapping[str, float]
    step_ms: Sequence[float]
    rows: Mapping[str, int]
    step_rows: Sequence[Mapping[str, int]]
    latents: NDArray[np.float32]
    cores: Mapping[str, float]


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: A B C, B C A, C A B, …, so that a change of the machine's speed affects all alike."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, min, max and count. p95 is interpolated: below 20 values it lies close to the max."""
    p50, p95 = np.percentile(values, (50, 95))
    ends = {"min": float(min(values)), "max": float(max(values))}
    return {"p50": float(p50), "p95": float(p95), **ends, "count": len(values)}


def speed_ratio(baseline_ms: Sequence[float], ours_ms: Sequence[float]) -> dict[str, Any]:
    """How many times faster ours is: the median of the ratios within each round, with the extremes and every pair."""
    pairs = [baseline / ours for baseline, ours in zip(baseline_ms, ours_ms, strict=True)]
    return {"median": float(np.median(pairs)), "min": min(pairs), "max": max(pairs), "pairs": pairs}


def relative_rms(values: NDArray[Any], truth: NDArray[Any]) -> float:
    """RMS of values - truth over the RMS of truth, in float64."""
    exact = np.asarray(truth, np.float64)
    return float(np.sqrt(np.mean((np.asarray(values, np.float64) - exact) ** 2) / np.mean(exact**2)))


def differences(snapshots: Sequence[Mapping[str, int]], names: Sequence[str]) -> list[dict[str, int]]:
    """The growth of the running counts of `names` between snapshots; the first grew from zero. Zeros are left out."""
    steps, before = [], dict.fromkeys(names, 0)
    for now in snapshots:
        grown = {name: now.get(name, 0) - before[name] for name in names}
        steps.append({name: count for name, count in grown.items() if count})
        before = {name: now.get(name, 0) for name in names}
    return steps


def timed(make: Callable[[], T]) -> tuple[T, float, dict[str, float]]:
    """The result of `make`, its milliseconds, and the cores that this process lacked meanwhile, on average.

    cores_busy_elsewhere: kept busy by other processes. cores_stolen: given to other virtual machines by the host.
    Empty where the system does not say.
    """
    lacked, start = _lacked_seconds(), time.perf_counter()
    made = make()
    seconds, lacked_after = time.perf_counter() - start, _lacked_seconds()
    return made, seconds * 1e3, {name: max(0.0, (lacked_after[name] - lacked[name]) / seconds) for name in lacked}


def _lacked_seconds() -> dict[str, float]:
    """Core-seconds since the machine started that went elsewhere. From Linux' /proc/stat, in steps of 10 ms."""
    try:
        counts = map(int, STAT.read_text().split("\n", 1)[0].split()[1:])
        user, nice, system, _, _, irq, softirq, steal, *_ = (count / os.sysconf("SC_CLK_TCK") for count in counts)
    except (OSError, ValueError):
        return {}
    own = os.times()
    busy = user + nice + system + irq + softirq
    return {"cores_busy_elsewhere": busy - own.user - own.system, "cores_stolen": steal}


def hardware(threads: int, device: str = "cpu") -> dict[str, Any]:
    """The GPU, if the device is one; CPU model, cores, RAM, and the machine's load when the measurement began."""
    try:
        ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        ram_bytes = None
    return {
        "gpu": _gpu(device),
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "threads": threads,
        "cores_available": available_cores(),
        "cores": os.cpu_count(),
        "ram_bytes": ram_bytes,
        "system": f"{platform.system()} {platform.release()}",
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """The versions of Python and of every package that may affect a figure."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit that is measured, with "-dirty" if there are uncommitted changes; None outside a git checkout."""
    line = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _gpu(device: str) -> str | None:
    """The GPU's name, architecture, memory and driver. Raises BackendError if it cannot be used."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return None
    from cuda.bindings import driver

    from realisid_trt.backends.cuda_memory import Gpu, probe

    version, gpu = probe(int(number or 0)), Gpu(int(number or 0))
    _, _, total = driver.cuMemGetInfo()
    return f"{gpu.name}, {total / 2**30:.0f} GiB, driver for CUDA {version}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
