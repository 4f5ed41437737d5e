"""The program that test_through_cuda.py runs in a process of its own, where libcuda is the stand-in.

    python -m tests.kernels.through_cuda NAME FOLDER LIBRARY

FOLDER holds the compiled kernels; LIBRARY is their g++ build, which gives the right results. Prints one line if
all are right.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from realisid_trt.errors import BackendError, EngineMismatch
from realisid_trt.kernels import EVERYWHERE, INSIDE, RELOCATED
from realisid_trt.kernels.launch import OVERLAPS, Array, Kernels, levels
from tests.kernels.bench import OnCpu, OnGpu
from tests.kernels.cases import STATES, TYPES, Crop, Guide, Merge, Take
from tests.kernels.stand_in import Counters

Launch = Callable[[Any], list[Array]]


def launches(seed: int) -> Iterator[tuple[str, Launch]]:
    """Every kernel at least once, with inputs of its own: the entry point's name and what launches it on a bench."""
    for dtype in TYPES:
        rng = np.random.default_rng(seed)
        crop, take = Crop.draw(rng), Take.draw(rng, dtype)
        yield f"crop_upsample_{dtype}", partial(crop.launch, dtype=dtype)
        for state in STATES:
            yield f"guide_step_{dtype} {state}", partial(Guide.draw(rng, dtype, *state).launch, dtype=dtype)
        yield f"take_{dtype}", partial(take.launch, source=dtype, dtype=dtype)
        if dtype != "float32":
            yield f"take_float32_to_{dtype}", partial(take.launch, source="float32", dtype=dtype)
        for mode in ("bilinear", "area"):
            for overlap in OVERLAPS:
                for draw in (Merge.draw, Merge.draw_step):
                    launch = partial(draw(rng, dtype).launch, dtype=dtype, mode=mode, overlap=overlap)
                    yield f"relocate_merge_{mode}_{dtype}_{overlap}", launch


def every_kernel(folder: Path, library: Path) -> str:
    """Results through cuda.core equal, bit for bit, those of the g++ build when it is called directly."""
    gpu, used = open_gpu(folder), set()
    for seed in range(4):
        for name, launch in launches(seed):
            cpu = OnCpu(library)
            for ours, expected in zip(launch(gpu), launch(cpu), strict=True):
                np.testing.assert_array_equal(gpu.get(ours), cpu.get(expected), err_msg=f"{name}, seed {seed}")
        used |= set(gpu.kernels._kernels)
    assert len(used) == 26, sorted(used)
    return close(gpu)


def replay(folder: Path, library: Path) -> str:
    """A captured step, replayed: other boxes, rows, scales, means, residuals, noise and another sampler's matrices; the
    step is counted on the device, and latents and histories go on from step to step."""
    gpu, cpu, steps = open_gpu(folder), OnCpu(library), 4
    rng = np.random.default_rng(5)
    shapes = {"latents": (2, 4, 12, 9), "histories": (2, 2, 4, 12, 9), "noise": (2, 4, 12, 9), "skip": (3, 8, 12, 9)}
    sources = {"crops": (4, 8, 10, 10), "whole": (4, 8, 12, 9), "inside": (2, 8, 12, 9)}
    placements, first_box = (RELOCATED, EVERYWHERE, INSIDE), (0, -1, 4)

    def inputs() -> dict[str, Any]:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in rng.integers(1, 5, (6, 4))]
        rows_of = np.stack([rng.integers(0, rows, (3, 2)) for rows, *_ in sources.values()], axis=1)
        rows_of[rng.integers(0, 2, (3, 3)) > 0, 1] = -1
        rows_of[rng.integers(0, 3), rng.integers(0, 3)] = -1
        return {
            **{name: rng.standard_normal(shape, dtype=np.float32) for name, shape in (shapes | sources).items()},
            "boxes": np.array(boxes, np.int32)[:, None],
            "pictures": rng.integers(0, 2, 4).astype(np.int32),
            "encoder_of": rng.integers(0, 3, 3).astype(np.int32),
            "rows_of": rows_of.astype(np.int32),
            "scales": rng.random((3, 3), dtype=np.float32),
            "rules": np.stack([placements, rng.integers(0, 2, 3), first_box], axis=1).astype(np.int32),
            "decoder_of": np.array([[0, 1, 2], [2, 0, -1]], np.int32),
            "weights": rng.standard_normal((2, 3)),
            "matrix": rng.uniform(-1, 1, (steps, 4, 5)) * rng.integers(0, 2, (steps, 4, 5)),
        }

    def prepare(bench: Any) -> tuple[dict[str, Array], Callable[[Any], None]]:
        given = {name: bench.put(value) for name, value in first.items()}
        given |= {
            "step": bench.put(np.zeros(2, np.int32)),
            "tickets": bench.put(np.zeros(2, np.int32)),
            "faces": bench.empty((4, 4, 10, 10), "float16"),
            "merged": bench.empty(shapes["skip"], "float32"),
            "noise_pred": bench.empty((3, 4, 12, 9), "float32"),
            "preview": bench.empty((2, 4, 12, 9), "float32"),
            "first_half": bench.put(np.zeros(3, np.int32)),
        }
        plan = levels([given["skip"]], [[given[name]] for name in sources], [given["merged"]], [0])
        tables = [bench.put(table.view(np.int32)) for table in (plan.table, plan.sources)]
        flat = Array(given["boxes"].address, (4, 4), "int32")

        def step(stream: Any) -> None:
            kernels = bench.kernels
            kernels.crop_upsample(stream, given["latents"], given["pictures"], flat, given["faces"])
            names = "encoder_of", "rows_of", "scales", "rules", "boxes"
            kernels.relocate_merge(stream, plan, *tables, *(given[name] for name in names), "bilinear", "average")
            half = Array(given["merged"].address, (6, 4, 12, 9), "float32")
            kernels.take(stream, half, given["first_half"], given["noise_pred"])
            names = "latents", "histories", "step", "tickets", "noise_pred", "decoder_of", "weights", "matrix"
            kernels.guide_step(stream, *(given[name] for name in (*names, "noise", "preview")))

        return given, step

    first = inputs()
    on_gpu, enqueue = prepare(gpu)
    on_cpu, compute = prepare(cpu)
    enqueue(gpu.stream)  # once as it is, so that every kernel is loaded before the capture
    compute(None)
    gpu.stream.sync()
    before = Counters().launches
    builder = gpu.stream.create_graph_builder()
    builder.begin_building(mode="thread_local")
    enqueue(builder)
    builder.end_building()
    graph = builder.complete()
    assert Counters().launches == before  # captured, not run
    for _ in range(steps - 1):
        changed = inputs()
        del changed["latents"], changed["histories"]
        for name, value in changed.items():
            gpu.rewrite(on_gpu[name], value)
            cpu.rewrite(on_cpu[name], value)
        graph.launch(gpu.stream)
        compute(None)
        for name in ("faces", "merged", "latents", "histories", "preview", "step", "tickets"):
            np.testing.assert_array_equal(gpu.get(on_gpu[name]), cpu.get(on_cpu[name]), err_msg=name)
    assert gpu.get(on_gpu["step"]).tolist() == [steps] * 2
    assert Counters().launches - before == 4 * (steps - 1) and Counters().graph_launches == steps - 1
    graph.close()
    builder.close()
    return close(gpu)


def one_row(gpu: Any) -> tuple[Array, Array, Array]:
    """What `take` reads and writes for one row of four numbers."""
    return gpu.put(np.zeros((1, 4), np.float32)), gpu.put(np.zeros(1, np.int32)), gpu.empty((1, 4), "float32")


def refusals(folder: Path, library: Path) -> str:
    """An entry point that is missing or takes other arguments is refused; and the stand-in is strict."""
    gpu = open_gpu(folder)
    floats, rows, out = one_row(gpu)
    for name, sizes, said in (
        ("nobody", (), "the kernel nobody cannot be read from"),
        ("take_step_float32", (1, 2, 3, 4, 5), "takes 7 arguments, expected 5"),
    ):
        try:
            gpu.kernels._launch(gpu.stream, name, (1, 1), (), sizes)
        except EngineMismatch as error:
            assert said in str(error) and ".sm_90.cubin" in str(error) and "Build the engine again" in str(error)
        else:
            raise AssertionError(name)
    try:
        gpu.kernels.take(gpu.stream, Array(4096, (1, 4), "float32"), rows, out)
    except BackendError as error:
        assert "the GPU refused the kernel take_float32: CUDA_ERROR_ILLEGAL_ADDRESS" in str(error), error
    else:
        raise AssertionError("an address of nobody's was taken")
    refused(lambda: gpu.device.allocate(2**40, stream=gpu.stream), "OUT_OF_MEMORY")
    builder = gpu.stream.create_graph_builder().begin_building(mode="thread_local")
    refused(gpu.stream.sync, "CAPTURE")
    gpu.kernels.take(builder, floats, rows, out)
    builder.end_building().close()
    before = Counters().launches
    gpu.kernels.take(gpu.stream, floats, rows, out)
    assert Counters().launches == before  # no call has waited for it
    gpu.stream.sync()
    assert Counters().launches == before + 1
    empty = np.zeros(0, np.int32)
    gpu.kernels.take(gpu.stream, floats, gpu.put(empty), gpu.empty((0, 4), "float32"))  # no rows: nothing to do
    return close(gpu)


def host_functions(folder: Path, library: Path) -> str:
    """A network that runs on the CPU in the middle of a stream, also in a replay, and from two threads at once."""
    from cuda.bindings import driver

    gpu, order = open_gpu(folder), []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: order.append(Counters().launches))
    callback = driver.CUhostFn(ctypes.cast(function, ctypes.c_void_p).value)
    floats, rows, out = one_row(gpu)

    def enqueue(stream: Any, handle: Any) -> None:
        gpu.kernels.take(stream, floats, rows, out)
        (status,) = driver.cuLaunchHostFunc(handle, callback, 0)
        assert status == 0, status
        gpu.kernels.take(stream, floats, rows, out)

    enqueue(gpu.stream, gpu.stream.handle)
    gpu.stream.sync()
    builder = gpu.stream.create_graph_builder().begin_building(mode="thread_local")
    enqueue(builder, builder.stream.handle)
    graph = builder.end_building().complete()
    graph.launch(gpu.stream)
    graph.launch(gpu.stream)
    gpu.stream.sync()
    assert order == [1, 3, 5], order

    def work() -> None:
        gpu.device.set_current()
        stream = gpu.device.create_stream()
        for _ in range(200):
            enqueue(stream, stream.handle)
            stream.sync()
        stream.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 403 and Counters().launches == 6 + 800
    graph.close()
    builder.close()
    return close(gpu)


def refused(act: Callable[[], Any], code: str) -> None:
    try:
        act()
    except Exception as error:
        assert code in str(error), error
    else:
        raise AssertionError(f"expected {code}")


def open_gpu(folder: Path) -> OnGpu:
    return OnGpu(folder, [path.name for path in folder.iterdir()])


def close(gpu: OnGpu) -> str:
    """All memory is given back."""
    kernels: Kernels = gpu.kernels
    gpu.close()
    gc.collect()
    counters = Counters()
    assert counters.device_bytes == 0 and counters.pinned_bytes == 0, counters.device_bytes
    return f"{counters.launches} launches of {len(kernels._kernels)} kernels"


if __name__ == "__main__":
    name, folder, library = sys.argv[1:]
    print(globals()[name](Path(folder), Path(library)))
