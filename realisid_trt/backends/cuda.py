"""Shared by all GPU backends: arrays on one stream, the fused kernels, steps. A `Runner` executes the networks, and
cuda_graphs.py captures steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

import realisid_trt.kernels.launch as launch
from realisid_trt.kernels.launch import Array, Kernels

from ..manifest import Build, Manifest
from . import MergeRows, Usage
from .cuda_graphs import CapturedSteps, Graph
from .cuda_memory import Arena, Gpu, callers_device, gpu_errors, memory_errors
from .cuda_usage import GpuUsage

HALVES = ("float16", "bfloat16")


class Runner(Protocol):
    """The networks of one build, opened, on the GPU's stream."""

    def run(
        self, network: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array], repeating: bool = False
    ) -> Hashable:
        """Enqueues the network. repeating: whether the same call will follow, which may then be captured.

        Returns the state that a graph of this call would hold beside the arrays. The graph may be replayed while the
        state is equal. Raises BackendError.
        """

    def forget(self) -> None:
        """Invalidates all arrays passed so far."""

    def keep(self) -> None:
        """Writes kernels that were compiled during the runs to disk. Called at the end of every turn."""

    def unload(self, networks: Collection[str]) -> None:
        """Frees the weights of these networks; they are loaded again when they run. The stream must be idle."""

    def close(self) -> None:
        """Closes the networks. The stream must be idle; it is closed after them."""


class Space(NamedTuple):
    """Arrays that end together: where they lie, and those that were made, by the inputs that they were made of."""

    arena: Arena
    made: dict[Hashable, Any]

    def clear(self) -> None:
        self.made.clear()
        self.arena.reset()


class CudaBackend:
    """The backend protocol on one GPU. `get`, `start_request`, `elapsed_ms` and `unload` wait for the GPU; a step waits
    for the copies of the step before.

    The arrays of a request's calls come from one arena, those of a pass from another. Each buffer is keyed by the
    inputs that produced it and is allocated once, so every step of a pass writes to the same addresses. A kept array
    has memory of its own.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        build: Build,
        gpu: Gpu,
        kernels: Kernels,
        runner: Runner,
        capture: bool = False,
    ) -> None:
        """capture: after two identical runs of a step, record it as a CUDA graph and replay that from then on."""
        self.name, self.device, self.precision = name, f"cuda:{gpu.ordinal}", build.precision
        self._usage = GpuUsage(gpu)
        self._runner, self._kernels, self._gpu = runner, kernels, gpu
        self._networks = manifest.networks(build)
        self._levels, self._canvas = manifest.model.residual_levels, manifest.model.sample_size
        self._mode, self._overlap = manifest.config.relocate_mode, manifest.config.overlap
        self._calls, self._pass = Space(gpu.calls, {}), Space(gpu.passes, {})
        self._space = self._calls
        self._kept: dict[int, Any] = {}  # buffers, by address
        self._steps = CapturedSteps(gpu, self._usage, capture)
        # Runs at `close`, else with the last reference, else at the interpreter's exit while the driver is still
        # loaded.
        self._end = weakref.finalize(self, _end, runner, gpu, self._steps.graphs, self._kept)

    @property
    def usage(self) -> Usage:
        return self._usage

    def start_usage(self) -> Usage:
        self._usage = self._steps.usage = GpuUsage(self._gpu)
        return self._usage

    def start_request(self) -> None:
        self.start_usage()
        self._steps.interrupt()
        self._gpu.wait()
        self._gpu.turn_staging()
        self._calls.clear()
        self._runner.forget()

    def start_pass(self) -> AbstractContextManager[None]:
        self._pass.clear()  # without a wait: what is enqueued before still has the memory
        self._runner.forget()
        return self.in_pass()

    @contextmanager
    def in_pass(self) -> Iterator[None]:
        self._gpu.turn_staging()
        self._space = self._pass
        try:
            yield
        finally:
            self._space = self._calls

    @property
    def runner(self) -> Runner:
        """The runner of the networks."""
        return self._runner

    def unload(self, networks: Collection[str]) -> None:
        self._gpu.wait()
        self._steps.interrupt()
        self._steps.graphs.clear()
        self._runner.unload(networks)
        self._gpu.wait()  # only then does the pool give freed memory back to the system

    def close(self) -> None:
        self._end()
        self._calls.made.clear()
        self._pass.made.clear()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._gpu.current():
            yield
            self._runner.keep()

    def outside(self) -> AbstractContextManager[None]:
        return self._gpu.given_back()

    # Arrays

    def put(self, array: NDArray[Any], for_networks: bool = False) -> Array:
        array = np.ascontiguousarray(array)
        placed = self._new(array.shape, array.dtype.name)
        self._gpu.upload(array, placed.address)
        return self._in(self.precision, placed) if for_networks and placed.dtype == "float32" else placed

    def write(self, tensor: Array, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array)
        assert (array.shape, array.dtype.name) == (tensor.shape, tensor.dtype), (array.shape, array.dtype, tensor)
        self._gpu.upload(array, tensor.address)

    def keep(self, tensor: Array) -> Array:
        with memory_errors(tensor.nbytes):
            buffer = self._gpu.allocate(max(tensor.nbytes, 1))
        kept = Array(int(buffer.handle), tensor.shape, tensor.dtype)
        self._kept[kept.address] = buffer
        self.copy(tensor, kept)
        return kept

    def free(self, tensor: Array) -> None:
        if (buffer := self._kept.pop(tensor.address, None)) is not None:
            with gpu_errors():
                buffer.close()  # in stream order: work enqueued before still has it

    def join(self, tensors: Sequence[Array]) -> Array:
        rows = sum(tensor.shape[0] for tensor in tensors)
        joined = self._new((rows, *tensors[0].shape[1:]), tensors[0].dtype)
        start = joined.address
        for tensor in tensors:
            assert (tensor.shape[1:], tensor.dtype) == (joined.shape[1:], joined.dtype), (tensor, joined)
            self._gpu.copy(tensor.address, start, tensor.nbytes)
            start += tensor.nbytes
        return joined

    def part(self, tensor: Array, *place: int) -> Array:
        for index in place:
            shape = tensor.shape[1:]
            size = Array(0, shape, tensor.dtype).nbytes
            tensor = Array(tensor.address + index * size, shape, tensor.dtype)
        return tensor

    def copy(self, source: Array, target: Array) -> None:
        assert (source.shape, source.dtype) == (target.shape, target.dtype), (source, target)
        self._gpu.copy(source.address, target.address, source.nbytes)

    def get(self, tensor: Array) -> NDArray[Any]:
        if tensor.dtype == "bfloat16":
            bits = self._gpu.download(tensor.address, tensor.shape, np.uint16)
            return (bits.astype(np.uint32) << 16).view(np.float32)
        array = self._gpu.download(tensor.address, tensor.shape, tensor.dtype)
        return array.astype(np.float32) if tensor.dtype == "float16" else array

    def take(self, tensor: Array, rows: NDArray[np.int32]) -> Array:
        dtype = self.precision if tensor.dtype == "float32" else tensor.dtype
        same = rows.ndim == 1 and len(rows) == tensor.shape[0] and (rows == np.arange(len(rows))).all()
        if tensor.dtype == dtype and same:
            return tensor
        key, flat = ("take", tensor, rows.shape, rows.tobytes()), rows.reshape(-1)
        out: Array = self._once(key, lambda: self._new((*rows.shape, *tensor.shape[1:]), dtype))
        listed = Array(out.address, (len(flat), *tensor.shape[1:]), dtype)
        self._kernels.take(self._gpu.stream, tensor, self._rows(flat), listed)
        self._steps.note("take", tensor, self._rows(flat), listed)
        return out

    def take_step(self, table: Array, step: Array, pictures: Array, columns: Array) -> Array:
        shape = *pictures.shape, table.shape[-1]
        out = self._once(("take_step", table, pictures, columns), lambda: self._new(shape, table.dtype))
        self._kernels.take_step(self._gpu.stream, table, step, pictures, columns, out)
        self._steps.note("take_step", table, step, pictures, columns, out)
        return out

    # Networks

    def check(self, network: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._networks[network].check(shapes)

    def run(self, network: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        described = self._networks[network]
        shapes = {name: value.shape for name, value in inputs.items()}
        described.check(shapes)
        fed = {port.name: self._in(port.dtype, inputs[port.name]) for port in described.inputs}
        sizes = described.output_shapes(shapes)
        outputs: dict[str, Array] = self._once(
            (network, *shapes.items()),
            lambda: {port.name: self._new(sizes[port.name], port.dtype) for port in described.outputs},
        )
        with self.usage.measure(network, next(iter(shapes.values()))[0]):
            keep_alive = self._runner.run(network, fed, outputs, self._steps.repeating)
        self._steps.note(network, *fed.items(), *outputs.items(), keep_alive)
        return outputs

    # Kernels

    def crop_upsample(self, latents: Array, pictures: Array, boxes: Array) -> Array:
        shape = boxes.shape[0], latents.shape[1], self._canvas, self._canvas
        faces: Array = self._once(("crop_upsample", boxes), lambda: self._new(shape, self.precision))
        with self.usage.measure("crop_upsample", shape[0]):
            self._kernels.crop_upsample(self._gpu.stream, latents, pictures, boxes, faces)
        self._steps.note("crop_upsample", latents, pictures, boxes, faces)
        return faces

    def relocate_merge(
        self, skips: Sequence[Array], residuals: Sequence[Sequence[Array]], rows: MergeRows
    ) -> Sequence[Array]:
        count = rows.encoder_of.shape[0]
        of = rows.encoder_of, rows.rows_of, rows.scales, rows.rules, rows.boxes
        read = *skips, *(residual for source in residuals for residual in source)

        def plan() -> tuple[list[Array], launch.Levels, Array, Array]:
            out = [self._new((count, *skip.shape[1:]), skip.dtype) for skip in skips]
            levels = launch.levels(skips, residuals, out, self._levels)
            return out, levels, self.put(levels.table.view(np.int32)), self.put(levels.sources.view(np.int32))

        out: list[Array]
        out, levels, table, sources = self._once(("relocate_merge", rows.encoder_of, *read), plan)
        with self.usage.measure("relocate_merge", count):
            self._kernels.relocate_merge(self._gpu.stream, levels, table, sources, *of, self._mode, self._overlap)
        self._steps.note("relocate_merge", *read, *out, table, sources, *of)
        return out

    def guide_step(
        self,
        latents: Array,
        histories: Array | None,
        step: Array,
        noise_pred: Array,
        decoder_of: Array,
        weights: Array,
        matrix: Array,
        noise: Array | None,
        preview: Array | None,
    ) -> None:
        tickets = self._once(("tickets", step), lambda: self.put(np.zeros(step.shape, np.int32)))
        read = noise_pred, decoder_of, weights, matrix, noise, preview
        with self.usage.measure("guide_step", latents.shape[0]):
            self._kernels.guide_step(self._gpu.stream, latents, histories, step, tickets, *read)
        self._steps.note("guide_step", latents, histories, step, tickets, *read)

    # Steps and time

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        return self._steps.repeated(step)

    def stamp(self) -> Any:
        return self._gpu.stamp()

    def elapsed_ms(self, stamps: Sequence[Any]) -> list[float]:
        with gpu_errors():
            stamps[-1].sync()
        return [later - earlier for earlier, later in zip(stamps, stamps[1:], strict=False)]

    # Memory

    def _new(self, shape: tuple[int, ...], dtype: str) -> Array:
        array = Array(0, shape, dtype)
        return Array(self._space.arena.take(array.nbytes), shape, dtype)

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, made once per key until the request or the pass ends."""
        made = self._space.made
        if key not in made:
            made[key] = make()
        return made[key]

    def _rows(self, rows: NDArray[np.int32]) -> Array:
        placed: Array = self._once(("rows", rows.tobytes()), lambda: self.put(rows))
        return placed

    def _in(self, dtype: str, array: Array) -> Array:
        """The array in another precision. Only float32 → half is ever requested."""
        if array.dtype == dtype:
            return array
        out: Array = self._once(("in", dtype, array), lambda: self._new(array.shape, dtype))
        self._kernels.take(self._gpu.stream, array, self._rows(np.arange(array.shape[0], dtype=np.int32)), out)
        return out


def _end(runner: Runner, gpu: Gpu, graphs: dict[Hashable, Graph], kept: dict[int, Any]) -> None:
    """Waits, because graphs may be running. Then frees graphs, networks, kept arrays and GPU, in this order: networks
    use the stream until they are closed. A failure of one does not skip the next."""

    def free() -> None:
        while kept:
            kept.popitem()[1].close()

    with callers_device(), ExitStack() as then:  # the garbage collector may call this in any thread
        then.callback(gpu.close)
        then.callback(free)
        then.callback(runner.close)
        then.callback(graphs.clear)
        gpu.wait()
