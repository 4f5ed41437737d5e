"""CUDA C++ → cubins and PTX with NVRTC, out of pip's wheel: no GPU, no driver and no CUDA toolkit is needed.

Without NVRTC, kernels that another machine compiled from these sources are used: the variable REALISID_TRT_CUBINS names
their folder, as `compile_elsewhere` writes it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realisid_trt.errors import BuildError
from realisid_trt.files import sha256, whole_or_not
from realisid_trt.machine import available_cores

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
LATER = "compute_120"  # PTX, which a driver compiles for later GPUs
MAIN = "kernels.cu"
CUBINS = "REALISID_TRT_CUBINS"
OPTIONS = ("--std=c++17",)  # not --use_fast_math: divisions and square roots are rounded as IEEE 754 says


def sources() -> dict[str, str]:
    """Name → text of every CUDA source."""
    here = Path(__file__).parent
    names = sorted(path.name for path in here.glob("*.cuh"))
    return {name: (here / name).read_text(encoding="utf-8") for name in [MAIN, *names]}


def key(version: str | None = None) -> str:
    """Hash over everything that goes into a compilation: part of the files' names.

    version: of NVRTC; None: of the one that is installed. Raises BuildError if none is.
    """
    parts = (version or nvrtc_version(), *OPTIONS, *(f"{name}\0{text}" for name, text in sources().items()))
    return sha256("\0".join(parts).encode())[:12]


def compile_kernels(folder: Path, architectures: Sequence[str] = (*ARCHITECTURES, LATER)) -> list[str]:
    """Writes `KEY.sm_NN.cubin`, or `KEY.compute_NN.ptx`, per architecture into `folder`. Returns the names.

    Without NVRTC these files are copied, if the variable REALISID_TRT_CUBINS names a folder that has all of them.
    Raises BuildError, with the compiler's own log or with the command that installs it; DiskError.
    """
    try:
        names = file_names(key(), architectures)
    except BuildError as error:
        return _copied(folder, architectures, error)
    with ThreadPoolExecutor(available_cores()) as pool:  # two seconds of one core each
        for name, code in zip(names, pool.map(compile_for, architectures), strict=True):
            with whole_or_not(folder / name) as partial:
                partial.write_bytes(code)
    return names


def compile_elsewhere(folder: Path, architectures: Sequence[str]) -> list[str]:
    """Compiles for a machine without NVRTC: `folder`/VERSION/KEY.sm_NN.cubin. Returns the paths inside `folder`."""
    version = nvrtc_version()
    return [f"{version}/{name}" for name in compile_kernels(folder / version, architectures)]


def file_names(prefix: str, architectures: Sequence[str]) -> list[str]:
    return [f"{prefix}.{name}.{'cubin' if name.startswith('sm_') else 'ptx'}" for name in architectures]


def _copied(folder: Path, architectures: Sequence[str], error: BuildError) -> list[str]:
    """The names of the files that another machine compiled, with any NVRTC, after they are copied into `folder`.

    Raises BuildError if any is missing: `error`, and the name of the folder that was searched.
    """
    elsewhere = os.environ.get(CUBINS)
    if not elsewhere:
        raise error
    for versioned in sorted(Path(elsewhere).glob("*/")):
        names = file_names(key(versioned.name), architectures)
        if all((versioned / name).is_file() for name in names):
            for name in names:
                with whole_or_not(folder / name) as partial:
                    partial.write_bytes((versioned / name).read_bytes())
            return names
    raise BuildError(
        f"{error} {CUBINS}={elsewhere} does not hold these kernels for {', '.join(architectures)} either."
    ) from error


def compile_for(architecture: str, texts: Mapping[str, str] | None = None) -> bytes:
    """The cubin ("sm_90") or PTX ("compute_120") of all kernels. texts: other sources than the project's own.

    Raises BuildError, with the compiler's own log or with the command that installs it.
    """
    nvrtc = _nvrtc()
    texts = sources() if texts is None else texts
    options = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in OPTIONS)]
    with _program(nvrtc, texts) as program:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _fetched(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            text = log.rstrip(b"\0").decode(errors="replace").strip() or "It left no log."
            raise BuildError(
                f"NVRTC {nvrtc_version()} does not compile the kernels for {architecture}: {status}.\n{text}"
            )
        if architecture.startswith("sm_"):
            return _fetched(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        return _fetched(nvrtc, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)


def nvrtc_version() -> str:
    """NVRTC's version, such as "13.5". Raises BuildError without NVRTC."""
    nvrtc = _nvrtc()
    major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    return f"{major}.{minor}"


@functools.cache
def _nvrtc() -> Any:
    """cuda.bindings.nvrtc, its library found. Raises BuildError with the command that installs both."""
    advice = "The kernels are compiled with NVRTC: pip install 'realisid_trt[export]'"
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BuildError(f"cuda-bindings is not installed ({error}). {advice}") from error
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings' errors for a missing library have no common base
        raise BuildError(
            f"nvidia-cuda-nvrtc is not installed, or not for these bindings ({error}). {advice}"
        ) from error
    return nvrtc


@contextmanager
def _program(nvrtc: Any, texts: Mapping[str, str]) -> Iterator[Any]:
    headers = [name for name in texts if name != MAIN]
    (program,) = _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            texts[MAIN].encode(),
            MAIN.encode(),
            len(headers),
            [texts[name].encode() for name in headers],
            [name.encode() for name in headers],
        ),
    )
    try:
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _fetched(nvrtc: Any, size_of: Any, get: Any, program: Any) -> bytes:
    (size,) = _checked(nvrtc, size_of(program))
    content = bytearray(size)
    _checked(nvrtc, get(program, content))
    return bytes(content)


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values that a call returned after its status. Raises BuildError."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"NVRTC failed: {status}. Install it again: pip install --force-reinstall nvidia-cuda-nvrtc")
    return tuple(values)
