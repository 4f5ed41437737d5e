"""TensorRT, both flavours: each network is a plan, run on our stream, in our buffers, with one shared scratch."""

from __future__ import annotations

import json
import mmap
import warnings
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realisid_trt.kernels.launch import Array, Kernels

from ..errors import BackendError, EngineMismatch, RealisIDWarning, RequestError
from ..files import cache_folder, sha256
from ..manifest import Build, Manifest, Network
from .cuda import CudaBackend
from .cuda_memory import Gpu, callers_device, memory_errors
from .gpu_facts import GpuFacts, gpu_facts
from .tensorrt_flavours import (
    FLAVOURS,
    RTX_ARCHITECTURES,
    Flavour,
    RuntimeCache,
    can_capture,
    make_context,
    why_invalid,
)

if TYPE_CHECKING:
    import tensorrt as trt

TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
CONTEXTS = 16  # kept per network


def open_here(
    name: str,
    manifest: Manifest,
    device: str | None,
    networks: Collection[str] | None,
    cuda_graph: bool | None,
    preload: bool = True,
) -> CudaBackend:
    """The backend for this engine. device: "cuda" or "cuda:N"; None: the first GPU. cuda_graph: None: no.

    preload: open the plans now; False: each when it first runs.

    Raises BackendError, EngineMissing, EngineMismatch or RequestError before a plan is read.
    """
    ordinal = _ordinal(name, device)
    build, flavour = manifest.build_for(name, "cuda"), FLAVOURS[name]
    if problem := why_not(manifest, build, gpu_facts(ordinal)):
        raise EngineMismatch(problem)
    manifest.check_files(manifest.files_of(build, networks))
    with callers_device():
        gpu = Gpu(ordinal)
        kernels = Kernels.load(manifest.path / "kernels", manifest.files_in("kernels"))
        contexts = Contexts(flavour, manifest, build, gpu, networks, preload)
        return CudaBackend(name, manifest, build, gpu, kernels, contexts, bool(cuda_graph))


def cannot_run(name: str, manifest: Manifest, device: str | None) -> str | None:
    """Why "auto" does not take this backend here, or None. Warns if its plans do not fit this GPU or version."""
    if device is not None and not device.startswith("cuda"):
        return f"{name} runs on a GPU only"
    try:
        flavour, facts = FLAVOURS[name], gpu_facts(_ordinal(name, device))
        problem = why_not(manifest, manifest.build_for(name, "cuda"), facts) if flavour.module else None
    except BackendError as error:
        return str(error)
    if problem is not None:
        warnings.warn(f"backend {name} is not used: {problem}", RealisIDWarning, stacklevel=2)
    return problem


def _ordinal(name: str, device: str | None) -> int:
    kind, colon, number = (device or "cuda").partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdecimal())):
        raise RequestError(f"device {device!r} is unknown to backend {name}. Use cuda, or cuda:N for GPU N.")
    return int(number or 0)


def describe(name: str) -> str:
    """The installed version and the kind of its plans, for `doctor`. Raises BackendError for an unsupported version."""
    flavour = FLAVOURS[name]
    where = "plans for several architectures" if flavour.portable else "plans for the GPU they are built on"
    return f"{flavour.package} {flavour.version}, {where}"


def why_not(manifest: Manifest, build: Build, facts: GpuFacts) -> str | None:
    """Why this build does not run on this GPU, with the command that rebuilds it, or None. Reads no plan.

    Warns if the build runs but was optimised for another GPU.
    """
    flavour, mend = FLAVOURS[build.backend], manifest.rebuild()
    made_with, found = build.versions.get(flavour.package, "unknown"), flavour.version
    if made_with != found:
        return (
            f"{manifest.path} was built with {flavour.package} {made_with}; {found} is installed, and a plan runs with "
            f"the version that built it. {mend}, or pip install {flavour.package}=={made_with}."
        )
    built_for = build.architecture.split("+")
    if facts.architecture not in built_for:
        problem = (
            f"{manifest.path} holds {build.backend} plans for {', '.join(built_for)}; this is {facts.name}, "
            f"{facts.architecture}."
        )
        if not flavour.portable:
            return f"{problem} {mend} on this machine"
        if facts.architecture not in RTX_ARCHITECTURES:
            return f"{problem} TensorRT-RTX does not run on it; TensorRT does. {manifest.rebuild('tensorrt')}"
        return f"{problem} {mend} --arch {' '.join([*built_for, facts.architecture])}"
    if build.gpu is not None and (build.gpu["name"], build.gpu["sms"]) != (facts.name, facts.sms):
        warnings.warn(
            f"{manifest.path} was built on {build.gpu['name']} with {build.gpu['sms']} multiprocessors; this is "
            f"{facts.name} with {facts.sms}. It runs, but other kernels may be faster: rebuild it here.",
            RealisIDWarning,
            stacklevel=2,
        )
    return None


class Bound:
    """An execution context for inputs of one set of shapes, and where its tensors and its scratch memory lie."""

    def __init__(self, context: trt.IExecutionContext, number: int, scratch_bytes: int) -> None:
        self.context, self.number, self.scratch_bytes = context, number, scratch_bytes
        self.placed: Mapping[str, int] = {}
        self.scratch = 0, 0  # address and bytes
        self.capturable: bool | None = None  # None: not asked yet


class Contexts:
    """The networks of a build. A `Runner`.

    Contexts run one after another on one stream, so one scratch memory of the largest size is enough. A call that may
    be captured has a context of its own, whose addresses never change: a graph keeps the state that its contexts had
    at the capture. All other calls share one context per set of shapes.
    """

    def __init__(
        self,
        flavour: Flavour,
        manifest: Manifest,
        build: Build,
        gpu: Gpu,
        networks: Collection[str] | None,
        preload: bool = True,
    ) -> None:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.module
        self._flavour, self._manifest, self._build, self._gpu = flavour, manifest, build, gpu
        try:
            self._runtime = trt.Runtime(flavour.log.logger)
        except TypeError:  # pybind11 raises it for a factory that returned nothing
            raise BackendError(f"{flavour.name} cannot run here: {flavour.log.take_errors()}.") from None
        self._known = manifest.networks(build)
        self._wanted = set(self._known if networks is None else networks)
        self._cache = RuntimeCache(flavour, self._cache_files())
        self._engines: dict[str, trt.ICudaEngine] = {}
        self._bound: dict[str, OrderedDict[Hashable, Bound]] = {}
        self._made = self._kept = 0  # contexts; of those, how many had been made when the cache was written
        self._scratch: Any = None
        for name in self._known:
            if preload and name in self._wanted:
                self._engines[name] = self._open(self._known[name])

    def run(
        self, network: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array], repeating: bool = False
    ) -> Hashable:
        """Enqueues the network. Raises BackendError."""
        placed = {name: array.address for name, array in (*inputs.items(), *outputs.items())}
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        bound = self._context(network, inputs, (shapes, *placed.items()) if repeating else shapes)
        if placed != bound.placed:
            for name, address in placed.items():
                if not bound.context.set_tensor_address(name, address):
                    raise self._failure(network, f"does not take {name}")
            bound.placed = placed
        scratch = self._scratch_of(bound.scratch_bytes), int(self._scratch.size)
        if scratch != bound.scratch:  # another size at the same address is another memory
            bound.context.set_device_memory(*scratch)
            bound.scratch = scratch
        stream = int(self._gpu.stream.handle)
        if bound.capturable is None and repeating:
            bound.capturable = can_capture(self._flavour, bound.context, stream)
        if self._gpu.capturing and not bound.capturable:
            raise BackendError(f"{self._flavour.name} does not let {network} be captured")
        if not bound.context.execute_async_v3(stream):
            raise self._failure(network, "did not run")
        return bound.number, scratch

    def forget(self) -> None:
        """Nothing to do: `run` compares the addresses of arrays before it uses them."""

    def keep(self) -> None:
        """Writes newly compiled kernels to disk now: a server that is terminated does not call `close`."""
        if self._kept != self._made:
            self._cache.store()
            self._kept = self._made

    def inspected(self, network: str) -> str:
        """The layers of a plan from TensorRT's inspector, as JSON. The inspector needs a loaded plan."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._flavour.module
        inspector = self._engines[network].create_engine_inspector()
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def scratch_bytes(self) -> dict[str, int]:
        """The scratch memory that each opened plan needs at the largest sizes that it was built for."""
        return {name: int(engine.device_memory_size_v2) for name, engine in self._engines.items()}

    def unload(self, networks: Collection[str]) -> None:
        """Frees the weights of these networks, and the scratch memory, which the next run takes anew. The stream must
        be idle."""
        for name in networks:
            self._bound.pop(name, None)
            self._engines.pop(name, None)
        self._free_scratch()

    def close(self) -> None:
        """Writes newly compiled kernels to disk, then frees the networks."""
        try:
            self._cache.store()
        finally:
            self._bound.clear()
            self._engines.clear()
            self._free_scratch()

    def _free_scratch(self) -> None:
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    # Plans and contexts

    def _open(self, network: Network) -> trt.ICudaEngine:
        """The plan, deserialised. Raises BackendError, with TensorRT's message, or EngineMismatch."""
        file = self._manifest.path / network.file
        self._flavour.log.take_errors()
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            if reason := why_invalid(self._flavour, self._runtime, plan):
                raise EngineMismatch(f"{file} does not run on this GPU: {reason}. {self._manifest.rebuild()}")
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(
                f"{self._flavour.name} {self._flavour.version} cannot open {file}: {self._flavour.log.take_errors()}. "
                f"{self._manifest.rebuild()}"
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        types = {name: engine.get_tensor_dtype(name).name for name in names}
        holds = {name: TYPES.get(kind, kind) for name, kind in types.items()}
        expected = {port.name: port.dtype for port in (*network.inputs, *network.outputs)}
        if holds != expected:
            wrong = sorted(set(holds.items()) ^ set(expected.items()))
            raise EngineMismatch(
                f"{file} is not the network that the manifest describes: {wrong[0][0]} differs. "
                f"{self._manifest.rebuild()}"
            )
        return engine

    def _context(self, network: str, inputs: Mapping[str, Array], key: Hashable) -> Bound:
        """The context of this key, made for inputs of these shapes if it is new; the latest few are kept."""
        if network not in self._wanted:
            raise BackendError(f"{network} was not opened: Engine.load(…, networks=…) named others. Load it with all.")
        contexts = self._bound.setdefault(network, OrderedDict())
        if key in contexts:
            contexts.move_to_end(key)
            return contexts[key]
        if self._gpu.capturing:
            raise BackendError(f"{network} has not run with these addresses before, so it cannot be captured.")
        if network not in self._engines:  # unloaded, or not loaded before
            self._manifest.check_again(self._known[network])
            self._engines[network] = self._open(self._known[network])
        self._flavour.log.take_errors()
        context = make_context(self._engines[network], self._flavour, self._cache)
        if context is None:
            raise self._failure(network, "has no memory for one more context")
        for name, array in inputs.items():
            if not context.set_input_shape(name, tuple(array.shape)):
                raise self._failure(network, f"does not take {name} of shape {array.shape}")
        if missing := context.infer_shapes():
            raise self._failure(network, f"still lacks {', '.join(missing)}")
        self._made += 1
        bound = Bound(context, self._made, int(context.update_device_memory_size_for_shapes()))
        if len(contexts) >= CONTEXTS:
            self._gpu.wait()  # the oldest may still be running
            contexts.popitem(last=False)
        contexts[key] = bound
        return bound

    def _scratch_of(self, nbytes: int) -> int:
        """The address of scratch memory of at least `nbytes` bytes."""
        if self._scratch is None or self._scratch.size < nbytes:
            if self._gpu.capturing:
                raise BackendError("the scratch memory cannot grow while a step is captured.")
            if self._scratch is not None:
                self._scratch.close()  # in stream order: work enqueued before still has it
            self._scratch = None
            with memory_errors(nbytes):
                self._scratch = self._gpu.allocate(max(nbytes, 1))
        return int(self._scratch.handle)

    def _cache_files(self) -> tuple[Path, ...]:
        """Where the kernels that a GPU compiled from the plans are kept, by architecture and driver: beside the plans,
        or in the user's cache folder if the first cannot be written."""
        if not self._flavour.portable:
            return ()
        facts = gpu_facts(self._gpu.ordinal)
        name = f"{facts.architecture}-cuda{facts.cuda}.cache"
        engine = sha256(json.dumps(self._manifest.values["seal"], sort_keys=True).encode())[:16]
        return (
            self._manifest.path / "plans" / self._flavour.name / name,
            cache_folder() / "compiled" / f"{engine}-{name}",
        )

    def _failure(self, network: str, what: str) -> BackendError:
        return BackendError(f"{self._flavour.name}: {network} {what}: {self._flavour.log.take_errors()}.")
