"""A GPU for tests on machines without one: libcuda.so.1 of our own under the real cuda-python.

The g++ build of the kernels executes. Everything else, from loading the cubin to replaying a graph, happens as on a
GPU, as far as a driver can be seen from outside. stand_in.cpp lists the rules that it enforces.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"


def compiler() -> str | None:
    return shutil.which("g++")


def build_kernels(folder: Path, *options: str) -> Path:
    """libkernels.so in `folder`: host_NAME for every kernel, from the sources that are compiled for GPUs."""
    return build_host(KERNELS / "host.h", folder / "libkernels.so", *options)


def build_host(source: Path, target: Path, *options: str) -> Path:
    """`target`: host_NAME for every kernel of that source, which is or includes kernels/host.h."""
    _compile(source, target, "-std=c++17", "-O2", "-fopenmp", "-x", "c++", *options)
    return target


def build(folder: Path, kernels: Path | None = None) -> dict[str, str]:
    """Builds the stand-in, and the kernels unless given, into `folder`; returns the environment of a process to use it.

    Merge it into os.environ; the options in stand_in.cpp are further variables.
    """
    kernels = build_kernels(folder) if kernels is None else kernels
    _compile(HERE / "stand_in.cpp", folder / "libcuda.so.1", "-std=c++20", "-O1", "-Wl,-soname,libcuda.so.1")
    before = os.environ.get("LD_LIBRARY_PATH")
    return {
        "LD_LIBRARY_PATH": f"{folder}{os.pathsep}{before}" if before else str(folder),
        "STAND_IN_KERNELS": str(kernels),
    }


class Counters:
    """What the stand-in counted in this process."""

    def __init__(self) -> None:
        self._library: Any = ctypes.CDLL("libcuda.so.1")
        for name in ("live_bytes", "launches", "graph_launches", "live_events"):
            getattr(self._library, f"stand_in_{name}").restype = ctypes.c_size_t

    @property
    def device_bytes(self) -> int:
        """Device memory allocated and not freed."""
        return int(self._library.stand_in_live_bytes(0))

    @property
    def pinned_bytes(self) -> int:
        return int(self._library.stand_in_live_bytes(1))

    @property
    def launches(self) -> int:
        """Kernels that ran, those of replayed graphs included."""
        return int(self._library.stand_in_launches())

    @property
    def events(self) -> int:
        """Events made and not destroyed."""
        return int(self._library.stand_in_live_events())

    @property
    def graph_launches(self) -> int:
        return int(self._library.stand_in_graph_launches())


def _compile(source: Path, target: Path, *options: str) -> None:
    command = ["g++", "-shared", "-fPIC", *options, str(source), "-o", str(target), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
