"""An ONNX file → a TensorRT plan, proven to be in the requested precision."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from realisid_trt.backends.tensorrt_flavours import (
    FLAVOURS,
    Flavour,
    read_timing_cache,
    set_portable,
    timing_cache,
)
from realisid_trt.errors import BuildError, DiskError
from realisid_trt.files import whole_or_not
from realisid_trt.machine import peak_memory_bytes

from .truth.proof import Proof, fused_attentions, prove, weights_bytes

if TYPE_CHECKING:
    import tensorrt as trt

Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
# Called with the finished share of the build, in [0, 1], and its phase; returns False to cancel.
Watch = Callable[[float, str], bool]


@dataclass(frozen=True)
class PlanSettings:
    """How plans are built; the same for every network.

    flavour:            "tensorrt" or "tensorrt-rtx".
    precision:          "fp32", "fp16" or "bf16": what the graph is proven to be in.
    architectures:      of a portable plan, such as ("sm_86", "sm_89").
    workspace_bytes:    the most memory that a layer may use for itself while it runs; None: all that the GPU has.
    optimization_level: 0 (quick to build) to 5; None: TensorRT's own choice.
    timing_cache:       file with the times of kernels, read and written; `tensorrt` only.
    """

    flavour: str
    precision: str
    architectures: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None


@dataclass
class BuiltPlan:
    """The results of building a plan.

    capturable: the plan allocates nothing at run time. Without a GPU, TensorRT-RTX can guarantee this for a portable
                plan only up to some profile size.
    """

    proof: Proof
    seconds: float
    peak_bytes: int
    capturable: bool


def to_plan(
    onnx_file: Path, plan: Path, network: str, shapes: Shapes, settings: PlanSettings, watch: Watch | None = None
) -> BuiltPlan:
    """Writes `plan`. shapes: least, best and most of every input that is not always of one shape.

    Raises BuildError, with the builder's message, or BackendError if there is no such TensorRT here.
    """
    flavour = FLAVOURS[settings.flavour]
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    start = time.perf_counter()
    log = flavour.log
    log.take_errors()
    try:
        builder = trt.Builder(log.logger)
    except TypeError:  # pybind11 raises it for a factory that returned nothing
        raise BuildError(f"{flavour.name} cannot build here: {log.take_errors()}.") from None
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, log.logger)
    # By path: otherwise weights beside the graph are not found, and a graph beyond 2 GiB cannot be read.
    if not parser.parse_from_file(str(onnx_file.absolute())):
        raise BuildError(
            f"{network}: {flavour.name} {flavour.version} cannot read the graph: {_parser_errors(parser)}."
        )
    _let_attention_decompose(definition, flavour)
    proof = prove(definition, flavour, network, settings.precision)
    proof.weights_bytes = weights_bytes(onnx_file)

    monitor = None if watch is None else _monitor(flavour, watch)
    for capturable in (True, False) if flavour.portable else (True,):
        config = _config(builder, flavour, network, shapes, settings, capturable)
        if monitor is not None:
            config.progress_monitor = monitor
        if _write(builder, definition, config, flavour, plan):
            break
        words = log.take_errors()
        if "OutOfMemory" not in words or not capturable:  # of a GPU's memory, and this machine may have no GPU
            raise BuildError(f"{network}: {flavour.name} {flavour.version} built no plan: {words}.")
    if settings.timing_cache is not None and (timed := timing_cache(config, flavour)) is not None:
        with contextlib.suppress(DiskError), whole_or_not(settings.timing_cache) as partial:  # else they are timed anew
            partial.write_bytes(timed)
    proof.fused = fused_attentions(plan) if flavour.portable else None
    return BuiltPlan(proof, round(time.perf_counter() - start, 1), peak_memory_bytes(), capturable)


def _config(
    builder: trt.Builder, flavour: Flavour, network: str, shapes: Shapes, settings: PlanSettings, capturable: bool
) -> trt.IBuilderConfig:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in shapes.items():
        profile.set_shape(name, list(least), list(best), list(most))
    if shapes and config.add_optimization_profile(profile) < 0:
        raise BuildError(f"{network}: its profile was refused: {flavour.log.take_errors()}.")
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is asked for where half precision is not good enough
    # Scratch memory for the shapes that are run, and not for the largest of the profile.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for profilers and inspectors
    if flavour.portable:
        set_portable(config, flavour, settings.architectures, capturable)
    if settings.timing_cache is not None:
        read_timing_cache(config, flavour, settings.timing_cache)
    return config


def _write(
    builder: trt.Builder,
    definition: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    flavour: Flavour,
    plan: Path,
) -> bool:
    """Whether the plan was built; if it was not, the file is removed. Raises OSError for a disk that is full."""
    done = False
    try:
        with open(plan, "wb") as file:
            writer = _writer(flavour, file)
            done = builder.build_serialized_network_to_stream(definition, config, writer)
        if writer.failure is not None:
            done = False
            raise writer.failure
        return done
    finally:
        if not done:
            plan.unlink(missing_ok=True)


def _let_attention_decompose(definition: trt.INetworkDefinition, flavour: Flavour) -> None:
    """Where no fused kernel fits (float32, narrow heads), attention may use several kernels; else the build fails."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class
            cast("trt.IAttentionInputLayer", layer).attention.decomposable = True


def _parser_errors(parser: trt.OnnxParser) -> str:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f" (node {error.node_name() or error.node()}, {error.node_operator()})" if error.node() >= 0 else ""
        found.append(f"{error.desc().strip()}{where}")
    return "; ".join(found) or "it gave no reason"


def _monitor(flavour: Flavour, watch: Watch) -> trt.IProgressMonitor:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module

    class Monitor(trt.IProgressMonitor):
        """The finished share of the build. Phases are nested: a step of a phase is a share of its parent's step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, steps done
            self._furthest, self._go_on = 0.0, True
            self._lock = threading.Lock()  # the builder reports from several threads

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = parent_phase, max(1, num_steps), 0
            self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    parent, steps, _ = self._phases[phase_name]
                    self._phases[phase_name] = parent, steps, min(steps, step + 1)
            self._tell(phase_name)
            return self._go_on

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _tell(self, phase: str) -> None:
            with self._lock:
                chain, at = [], phase
                while at in self._phases:
                    chain.append(self._phases[at])
                    at = self._phases[at][0] or ""
                share, width = 0.0, 1.0
                for _, steps, done in reversed(chain):
                    share, width = share + width * done / steps, width / steps
                self._furthest = max(self._furthest, min(1.0, share))  # a bar does not go back
                self._go_on = watch(self._furthest, phase) and self._go_on

    return Monitor()


def _writer(flavour: Flavour, file: BinaryIO) -> Any:
    """A writer that takes the plan piece by piece, so that the whole plan need not fit into memory."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module

    class Writer(trt.IStreamWriter):
        failure: OSError | None = None

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # a full disk; an exception would not pass through the library
                self.failure = error
                return 0

    return Writer()
