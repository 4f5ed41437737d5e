"""The interface of a machine: it opens networks, runs them, owns their memory, and runs the fused kernels.

A backend is one file in this folder. The loop in `loop/denoise.py` gives it whole arrays by name and does not read
their values, so a backend may keep them in any memory; on a CPU they are NumPy arrays. Five rules:

- Latents are float32. Arrays that only networks read have the networks' precision: `put(…, for_networks=True)`.
- `take` and `take_step` may return their argument, or memory that their next call reuses.
- A network's outputs are valid until it runs again.
- A tensor is valid until the next request starts, that of a pass until the next pass, a kept one until it is freed.
- Everything may return before it is done; `get` and `elapsed_ms` wait.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, RequestError
from ..machine import unsupported
from ..manifest import Manifest

Tensor = Any  # an array where the backend keeps its arrays: np.ndarray on a CPU


class KnownBackend(NamedTuple):
    """A backend of this version: its module here, the package that it needs, the extra that installs the package."""

    module: str
    package: str
    extra: str


# In the order in which "auto" prefers them.
KNOWN = {
    "tensorrt": KnownBackend("tensorrt", "tensorrt", "tensorrt"),
    "tensorrt-rtx": KnownBackend("tensorrt", "tensorrt_rtx", "tensorrt-rtx"),
    "onnxruntime": KnownBackend("onnxruntime", "onnxruntime", "cpu"),
}


class Usage:
    """Rows evaluated and milliseconds since it was started, by network or kernel, as counted by the backend."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self._ms: dict[str, float] = {}

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds by name."""
        return self._ms

    @contextmanager
    def measure(self, name: str, rows: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, rows, (time.perf_counter() - start) * 1e3)

    def add(self, name: str, rows: int, ms: float) -> None:
        self.rows[name] = self.rows.get(name, 0) + rows
        self._ms[name] = self._ms.get(name, 0.0) + ms


@dataclass(frozen=True, eq=False)
class MergeRows:
    """Where `relocate_merge` adds each residual. R decoder rows; S sources, the branches that have rows in this step;
    at most N rows of a source to a decoder row.

    encoder_of:  (R,) int32, the encoder row that decoder row r continues.
    rows_of:     (R, S, N) int32, the rows of source s that decoder row r receives, -1 after the last; the first is -1
                 where it receives none.
    scales:      (R, S) float32.
    rules:       (S, 3) int32: the source's placement, one of `kernels`' EVERYWHERE, INSIDE and RELOCATED; 1 if its rows
                 are averaged, 0 if they are summed; the index of its first row in `boxes`, -1 without boxes.
    boxes:       (ΣP, L, 4) int32, in cells of every level: one for every row of the sources that have boxes, one source
                 after another.
    """

    encoder_of: Tensor
    rows_of: Tensor
    scales: Tensor
    rules: Tensor
    boxes: Tensor


class Backend(Protocol):
    """The interface of a backend. `kernels/` states the shapes of the kernels' arguments. A backend takes their
    constants (levels, canvas, relocate mode, overlap) from the manifest that it was opened with."""

    name: str
    device: str
    precision: str

    @property
    def usage(self) -> Usage:
        """What is counted now."""

    def start_usage(self) -> Usage:
        """Counts from zero. The Usage before it may still be read."""

    def start_request(self) -> None:
        """Starts the calls of one request outside of the loop: usage counts from zero, and the memory of tensors that
        were returned outside of passes is used again. Kept tensors and those of the pass stay."""

    def start_pass(self) -> AbstractContextManager[None]:
        """Starts a pass of the loop: the memory of the pass before it is used again. A context for its tensors."""

    def in_pass(self) -> AbstractContextManager[None]:
        """A context for the steps of the current pass: tensors are those of the pass."""

    def unload(self, networks: Collection[str]) -> None:
        """Frees the weights of these networks. They are loaded again when they run."""

    def close(self) -> None:
        """Frees networks and memory, in order. No other call may follow. May be repeated."""

    def turn(self) -> AbstractContextManager[None]:
        """A context for one user's calls: the backend's device is current in this thread, afterwards the caller's."""

    def outside(self) -> AbstractContextManager[None]:
        """Inside a turn, a context for the caller's code: the caller's device is current, afterwards the backend's."""

    def put(self, array: NDArray[Any], for_networks: bool = False) -> Tensor:
        """The array, where the networks and kernels can read it."""

    def write(self, tensor: Tensor, array: NDArray[Any]) -> None:
        """Copies the array into a tensor of the same shape and type that `put` returned, after all work that was
        enqueued so far. The caller may change the array at once. On a CPU a tensor may be the array that was put."""

    def get(self, tensor: Tensor) -> NDArray[Any]:
        """The tensor as a new NumPy array, float32 or integers."""

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it, that stays until it is freed: beyond requests and passes."""

    def free(self, tensor: Tensor) -> None:
        """Ends a kept tensor."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of one type one after another along the first axis. May return the only one."""

    def part(self, tensor: Tensor, *place: int) -> Tensor:
        """tensor[place]: a view of one entry along the first axes."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copies a tensor into another one of the same shape and type, after all work that was enqueued so far."""

    def take(self, tensor: Tensor, rows: NDArray[np.int32]) -> Tensor:
        """tensor[rows]: rows along the first axis; an index may occur several times. rows may have any shape."""

    def take_step(self, table: Tensor, step: Tensor, pictures: Tensor, columns: Tensor) -> Tensor:
        """table[step[pictures], columns]: of a (S, K, E) table, each row's entry at its picture's step."""

    def check(self, network: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ShapeError if the network cannot be fed with these shapes; inputs not named are not checked."""

    def run(self, network: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's outputs by name, in the manifest's order."""

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step as a function for many identical calls; a backend may record it."""

    def stamp(self) -> Any:
        """A marker after all work that was enqueued so far."""

    def elapsed_ms(self, stamps: Sequence[Any]) -> list[float]:
        """Milliseconds between consecutive markers; waits for the last one."""

    def crop_upsample(self, latents: Tensor, pictures: Tensor, boxes: Tensor) -> Tensor: ...

    def relocate_merge(
        self, skips: Sequence[Tensor], residuals: Sequence[Sequence[Tensor]], rows: MergeRows
    ) -> Sequence[Tensor]:
        """residuals: of every source, one tensor per skip."""

    def guide_step(
        self,
        latents: Tensor,
        histories: Tensor | None,
        step: Tensor,
        noise_pred: Tensor,
        decoder_of: Tensor,
        weights: Tensor,
        matrix: Tensor,
        noise: Tensor | None,
        preview: Tensor | None,
    ) -> None: ...


def installed(backend: str) -> bool:
    """Whether the package that a known backend needs can be imported."""
    return importlib.util.find_spec(KNOWN[backend].package) is not None


def open_backend(
    name: str,
    manifest: Manifest,
    device: str | None = None,
    networks: Collection[str] | None = None,
    cuda_graph: bool | None = None,
    preload: bool = True,
) -> Backend:
    """The backend that will run this engine. "auto": the first of KNOWN that it was built for and that this machine can
    run.

    networks:   only these can run; None: all.
    cuda_graph: replay a captured step on a GPU; None: if the backend is known to gain by it.
    preload:    open the networks now; False: each when it first runs. Their files are verified now in either case.

    Raises BackendError (unknown or not installed, with the command that installs it; a network that does not open),
    EngineMissing (not built for it), EngineMismatch (built for another GPU or version) or RequestError (no such
    device, no such network).
    """
    if problem := unsupported():
        raise BackendError(problem)
    if networks is not None:
        networks = _names(networks, manifest.values["networks"])
    chosen = _choose(name, manifest, device)
    backend: Backend = _implementation(chosen).open_here(chosen, manifest, device, networks, cuda_graph, preload)
    return backend


def _names(networks: object, known: Collection[str]) -> tuple[str, ...]:
    """The requested names of networks. Raises RequestError unless they are a collection of known names."""
    names = () if isinstance(networks, (str, bytes)) or not isinstance(networks, Collection) else tuple(networks)
    unknown = [name for name in names if not isinstance(name, str) or name not in known]
    if unknown or isinstance(networks, (str, bytes)) or not isinstance(networks, Collection):
        raise RequestError(
            f'networks is {networks!r}, expected names such as ("id_encoder",). Known: {", ".join(sorted(known))}.'
        )
    return names


def _implementation(name: str) -> Any:
    return importlib.import_module(f".{KNOWN[name].module}", __name__)


def _choose(name: str, manifest: Manifest, device: str | None) -> str:
    if name not in ("auto", *KNOWN):
        raise BackendError(f"backend {name!r} is unknown. Known: auto, {', '.join(KNOWN)}.")
    if name != "auto":
        manifest.build_for(name, "cuda")
        if not installed(name):
            raise BackendError(
                f"backend {name} needs the package {KNOWN[name].package}. "
                f"pip install 'realisid_trt[{KNOWN[name].extra}]'"
            )
        return name
    built = {build.backend for build in manifest.builds.values()}
    runnable = [name for name in KNOWN if name in built]
    problems = []
    for name in runnable:
        if not installed(name):
            problems.append(f"pip install 'realisid_trt[{KNOWN[name].extra}]'")
        elif problem := _implementation(name).cannot_run(name, manifest, device):
            problems.append(problem)
        else:
            return name
    advice = " ".join(f"{problem.rstrip('.')}." for problem in problems)
    raise BackendError(
        f"{manifest.path} was built for {', '.join(sorted(built))}; none of them can run here. "
        f"{advice or 'This version knows none of them: upgrade realisid_trt, or build again.'}"
    )
