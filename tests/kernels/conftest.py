"""The kernels, compiled: by g++ for this machine, by NVRTC for every GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realisid_trt.errors import BackendError
from realisid_trt.kernels.compile import ARCHITECTURES, LATER, compile_kernels
from realisid_trt.kernels.launch import choose, open_driver
from tests.kernels import stand_in
from tests.kernels.bench import OnCpu, OnGpu
from tests.kernels.two_sources import TwoSources


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libkernels.so, from the sources that are compiled for GPUs."""
    if not stand_in.compiler():
        pytest.skip("no g++ here: the kernels' source cannot be tried on a CPU. apt install g++")
    return stand_in.build_kernels(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def two_sources(host_kernels: Path) -> TwoSources:
    """The merge kernel that knew two sources only."""
    source = Path(__file__).with_name("two_sources.cpp")
    return TwoSources(stand_in.build_host(source, host_kernels.with_name("libtwo_sources.so")))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and the names of its cubins and PTX for every architecture."""
    folder = tmp_path_factory.mktemp("compiled")
    return folder, compile_kernels(folder)


@pytest.fixture(params=["of-the-commit", pytest.param("fixed", marks=pytest.mark.slow)])
def draws(request: pytest.FixtureRequest, seed: int) -> Callable[[int], list[list[int]]]:
    """draws(n): seeds of n random cases that are the same for ever, in the slow lanes; of n/4 that every commit has
    anew, every time: --seed repeats them."""
    if request.param == "fixed":
        return lambda count: [[number] for number in range(count)]
    return lambda count: [[seed, number] for number in range(-(-count // 4))]


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def new_bench(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Makes a bench without any arrays: OnCpu or OnGpu."""
    if request.param == "cpu":
        library = request.getfixturevalue("host_kernels")
        return lambda: OnCpu(library)
    try:
        open_driver()
    except BackendError as error:
        pytest.skip(str(error))
    from cuda.core import Device

    folder = request.getfixturevalue("tmp_path_factory").mktemp("gpu")
    named = [f"x.{name}.{'cubin' if name.startswith('sm_') else 'ptx'}" for name in (*ARCHITECTURES, LATER)]
    architecture = choose(named, Device().compute_capability).split(".")[1]
    gpu = OnGpu(folder, compile_kernels(folder, [architecture]))
    request.addfinalizer(gpu.close)

    def cleared() -> OnGpu:
        gpu.clear()
        return gpu

    return cleared
