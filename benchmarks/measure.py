"""What every measurement needs: interleaved runs, percentiles, and the facts without which a figure says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from realisid_trt.machine import available_cores

T = TypeVar("T")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")
PACKAGES = ("realisid_trt", *RUNTIMES, "torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True, eq=False)
class Run:
    """One picture, made and timed.

    total_ms:  from the call to the picture.
    stages:    milliseconds by stage; "a.b" is a part of "a".
    step_ms:   milliseconds of each denoising step.
    rows:      rows that each network evaluated.
    step_rows: the same of each denoising step.
    latents:   (1, C, h, w) float32, the final ones.
    elsewhere: cores that other processes kept busy meanwhile, on average; None where the system does not say.
    """

    total_ms: float
    stages: Mapping[str, float]
    step_ms: Sequence[float]
    rows: Mapping[str, int]
    step_rows: Sequence[Mapping[str, int]]
    latents: NDArray[np.float32]
    elsewhere: float | None


def interleave(contenders: Mapping[str, Callable[[int], T]], rounds: Iterable[int]) -> Iterator[dict[str, T]]:
    """Every contender once per round, A B, B A, A B, …: whatever slows the machine down meets all of them alike.

    contenders: name → callable of the round's number.
    Yields name → what the contender returned, in the order of `contenders`, round after round.
    """
    names = list(contenders)
    for number in rounds:
        done = {name: contenders[name](number) for name in (names if number % 2 == 0 else names[::-1])}
        yield {name: done[name] for name in names}


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, min and max. p95 of n values is interpolated: below 20 values it lies close to the max."""
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "min": float(min(values)), "max": float(max(values))}


def speed_ratio(baseline_ms: Sequence[float], ours_ms: Sequence[float]) -> dict[str, Any]:
    """How many times faster ours is: the median of the ratios within each round, with the extremes and every pair."""
    pairs = [baseline / ours for baseline, ours in zip(baseline_ms, ours_ms, strict=True)]
    return {"median": float(np.median(pairs)), "min": min(pairs), "max": max(pairs), "pairs": pairs}


def relative_rms(values: NDArray[Any], truth: NDArray[Any]) -> float:
    """RMS of values - truth over the RMS of truth, in float64."""
    exact = np.asarray(truth, np.float64)
    return float(np.sqrt(np.mean((np.asarray(values, np.float64) - exact) ** 2) / np.mean(exact**2)))


def differences(snapshots: Sequence[Mapping[str, int]], names: Sequence[str]) -> list[dict[str, int]]:
    """What a running count of `names` grew by between snapshots; the first grew from zero. Zeros are left out."""
    steps, before = [], dict.fromkeys(names, 0)
    for now in snapshots:
        grown = {name: now.get(name, 0) - before[name] for name in names}
        steps.append({name: count for name, count in grown.items() if count})
        before = {name: now.get(name, 0) for name in names}
    return steps


def timed(make: Callable[[], T]) -> tuple[T, float, float | None]:
    """What `make` returned, its milliseconds, and how many cores other processes kept busy meanwhile (or None)."""
    others, start = _others_seconds(), time.perf_counter()
    made = make()
    seconds, others_after = time.perf_counter() - start, _others_seconds()
    busy = None if others is None or others_after is None else max(0.0, (others_after - others) / seconds)
    return made, seconds * 1e3, busy


def _others_seconds() -> float | None:
    """Core-seconds that everything but this process has computed. From Linux' /proc/stat, in steps of 10 ms."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
    except (OSError, ValueError):
        return None
    own = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def hardware(threads: int) -> dict[str, Any]:
    """CPU model, cores, RAM and how busy the machine was when the measurement began."""
    try:
        ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        ram_bytes = None
    return {
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
    """Of Python and of every package that could have a part in a figure."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
