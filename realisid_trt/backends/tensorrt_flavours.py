"""The two flavours of TensorRT. They share one API; this file holds all differences of flavours and versions.

`tensorrt` builds a plan on the GPU that will run it, for that one architecture. `tensorrt-rtx` builds anywhere, for a
list of architectures, finishes on the user's GPU, and keeps the compiled kernels in a runtime cache.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import BackendError, DiskError
from ..files import whole_or_not

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx

RTX_ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")  # no sm_90, no sm_100


@dataclass(frozen=True)
class Flavour:
    """One flavour, by the name of its backend.

    package:       its Python package. `name` is also the extra that installs it.
    oldest, before: versions that its API was checked with: oldest <= version < before.
    portable:      its plans are for a list of architectures, and need no GPU to be built.
    """

    name: str
    package: str
    oldest: tuple[int, int]
    before: tuple[int, int]
    portable: bool

    @property
    def module(self) -> Any:
        """The package, imported. Raises BackendError, with what to do, if it is missing or of another version."""
        return _load(self)

    @property
    def version(self) -> str:
        """Such as "1.7.1.116"."""
        return str(self.module.__version__)

    @property
    def installed(self) -> bool:
        """Whether the package can be found; its version is not checked."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def log(self) -> Log:
        """The library's errors. TensorRT keeps the first logger registered in a process, so all code shares this
        one."""
        return _log(self)


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour("tensorrt", "tensorrt", (10, 14), (12, 0), portable=False),
        Flavour("tensorrt-rtx", "tensorrt_rtx", (1, 7), (2, 0), portable=True),
    )
}


@functools.cache
def _load(flavour: Flavour) -> Any:
    mend = f"pip install 'realisid_trt[{flavour.name}]'"
    try:
        module = importlib.import_module(flavour.package)
    except (ImportError, OSError) as error:  # the package, or a library that it loads
        raise BackendError(f"backend {flavour.name} needs the package {flavour.package} ({error}). {mend}") from None
    found = tuple(int(part) for part in module.__version__.split(".")[:2])
    if not flavour.oldest <= found < flavour.before:
        oldest, before = (".".join(map(str, version)) for version in (flavour.oldest, flavour.before))
        raise BackendError(
            f"{flavour.package} {module.__version__} is installed; this realisid_trt works with versions from {oldest} "
            f"up to, but not including, {before}. {mend}"
        )
    return module


class Log:
    """The errors of one library since they were last taken.

    logger: for Builder, Runtime and parser.
    """

    def __init__(self) -> None:
        self.logger: trt.ILogger
        self._errors: list[str] = []

    def take_errors(self) -> str:
        """The lines of errors since the last call, in the library's own words."""
        lines, self._errors = self._errors, []
        return "; ".join(dict.fromkeys(line.strip() for line in lines)) or "it gave no reason"

    def error(self, line: str) -> None:
        self._errors.append(line)


@functools.cache
def _log(flavour: Flavour) -> Log:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module

    log = Log()

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity <= trt.ILogger.ERROR:
                log.error(msg)

    log.logger = Logger()
    return log


# While a plan is built


def set_portable(config: trt.IBuilderConfig, flavour: Flavour, architectures: Sequence[str], capturable: bool) -> None:
    """Sets the architectures of a portable plan, such as "sm_89"; none: TensorRT's own choice.

    capturable: the plan shall allocate nothing at run time; otherwise it cannot be captured.

    Raises BackendError for an architecture that it does not know.
    """
    if TYPE_CHECKING:
        import tensorrt_rtx as rtx
    else:
        rtx = flavour.module
    portable = cast("rtx.IBuilderConfig", config)
    if capturable:
        portable.set_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
    portable.num_compute_capabilities = len(architectures)
    for index, architecture in enumerate(architectures):
        capability = getattr(rtx.ComputeCapability, architecture.replace("_", "").upper(), None)
        if capability is None or not portable.set_compute_capability(capability, index):
            raise BackendError(
                f"{flavour.name} {flavour.version} does not build for {architecture}. Known: "
                f"{', '.join(RTX_ARCHITECTURES)}. For others use --backend tensorrt, on that GPU."
            )


def read_timing_cache(config: trt.IBuilderConfig, flavour: Flavour, file: Path) -> None:
    """Loads the kernel timings of earlier builds into the builder. Does nothing for RTX, which times no kernels."""
    if flavour.portable:
        return
    known = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known) or config.create_timing_cache(b""), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)  # another version's
    flavour.log.take_errors()


def timing_cache(config: trt.IBuilderConfig, flavour: Flavour) -> bytes | None:
    """The builder's kernel timings so far; None for RTX."""
    if flavour.portable:
        return None
    cache = config.get_timing_cache()
    return None if cache is None else bytes(memoryview(cache.serialize()))


# Where a plan runs


def why_invalid(flavour: Flavour, runtime: trt.Runtime, plan: mmap) -> str | None:
    """Why RTX refuses a plan on this GPU, by the plan's header; None if it accepts it. Always None for `tensorrt`,
    which has no such check."""
    if not flavour.portable:
        return None
    if TYPE_CHECKING:
        import tensorrt_rtx as rtx
    else:
        rtx = flavour.module
    checker = cast("rtx.Runtime", runtime)
    validity, reasons = checker.get_engine_validity(plan[: checker.engine_header_size])
    if validity != rtx.EngineValidity.INVALID:
        return None
    named = [
        name.lower().replace("_", " ")
        for name, bit in rtx.EngineInvalidityDiagnostics.__members__.items()
        if reasons & int(bit)
    ]
    return ", ".join(named) or flavour.log.take_errors()


def make_context(engine: trt.ICudaEngine, flavour: Flavour, cache: RuntimeCache) -> trt.IExecutionContext | None:
    """An execution context whose activations live in memory that we give it."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    settings = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if flavour.portable:
        cache.use(cast("rtx.IRuntimeConfig", settings))
    return engine.create_execution_context(settings)


class RuntimeCache:
    """Kernels that RTX compiled for this GPU, kept in a file. All plans of a build share it; `tensorrt` has none.

    files: candidates; the first that can be written is used. Empty: the cache stays in memory.
    """

    def __init__(self, flavour: Flavour, files: Sequence[Path]) -> None:
        self._flavour, self._files = flavour, files
        self._cache: rtx.IRuntimeCache | None = None
        self._stored = b""

    def use(self, settings: rtx.IRuntimeConfig) -> None:
        """Makes a context compile through this cache, and leaves CUDA graphs to us."""
        if TYPE_CHECKING:
            import tensorrt_rtx as rtx
        else:
            rtx = self._flavour.module
        if self._cache is None:
            cache = settings.create_runtime_cache()
            for file in reversed(self._files):  # the user's file first: it is the newer one
                with contextlib.suppress(OSError):  # there is none, or it cannot be read
                    self._stored = file.read_bytes()
                if self._stored and cache.deserialize(self._stored):
                    break
                self._stored = b""  # another version's: it is written anew
                self._flavour.log.take_errors()
            self._cache = cache
        settings.set_runtime_cache(self._cache)
        settings.cuda_graph_strategy = rtx.CudaGraphStrategy.DISABLED
        # A graph must not hold the temporary kernels that run while better ones are compiled in the background.
        specialization = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.dynamic_shapes_kernel_specialization_strategy = specialization

    def store(self) -> None:
        """Writes the file if something new was compiled. Folders that cannot be written are not an error."""
        if self._cache is None or not self._files or not self._files[0].parent.is_dir():  # the engine was removed
            return
        content = self._cache.serialize()
        now = b"" if content is None else bytes(memoryview(content))
        if not now or now == self._stored:
            return
        for file in self._files:
            with contextlib.suppress(DiskError, OSError):
                with whole_or_not(file) as partial:
                    partial.write_bytes(now)
                self._stored = now
                return


def can_capture(flavour: Flavour, context: trt.IExecutionContext, stream: int) -> bool:
    """Whether RTX lets this context be captured on this stream. Always True for `tensorrt`, which has no such check."""
    return not flavour.portable or cast("rtx.IExecutionContext", context).is_stream_capturable(stream)
