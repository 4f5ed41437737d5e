"""The networks of a build, exported and verified in processes of their own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from realisid_trt.errors import BuildError

from .checkpoint import Checkpoint
from .networks import networks
from .staging import Artifact, Staging, disk_errors
from .to_onnx import port, to_onnx
from .variants import Limits, Variant
from .verify import flops_per_row, verify

if TYPE_CHECKING:
    from .build import Job, Options


def export_networks(
    staging: Staging,
    checkpoint: Checkpoint,
    options: Options,
    jobs: Sequence[Job],
    small_bytes: int,
    progress: bool = False,
) -> dict[str, Artifact]:
    """Does the jobs, largest first. Returns the artifacts by name.

    Each is added to the staging folder as soon as it is verified, so that nothing is lost when the next one fails.
    """
    if not jobs:
        return {}
    small = max(job.weights_bytes for job in jobs) <= small_bytes
    workers = min(len(jobs), options.jobs or (min(2, os.cpu_count() or 1) if small else 1))
    threads = max(1, (os.cpu_count() or 1) // workers)
    made: dict[str, Artifact] = {}
    waiting: dict[Future[dict[str, Any]], tuple[Job, Path]] = {}
    bar = tqdm(total=len(jobs), desc="networks", unit="network", disable=not progress)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(os.getpid(), threads))
    try:
        for job in sorted(jobs, key=lambda job: -job.weights_bytes):
            folder = staging.workspace(job.artifact.replace(":", "-"))
            where = (checkpoint.path, options.base_model, options.variant)
            arguments = (where, job.network, job.variant, options.limits, folder, job.weights_bytes <= small_bytes)
            waiting[pool.submit(export_network, *arguments)] = job, folder
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                job, folder = waiting.pop(future)
                info = future.result()
                made[job.artifact] = staging.add(job.artifact, job.key, folder, info)
                bar.set_postfix_str(f"{job.network} in {info['seconds']:.0f} s")
                bar.update()
    except BrokenProcessPool:
        names = ", ".join(sorted(job.network for job, _ in waiting.values()))
        raise BuildError(
            f"a process that exported one of {names} was killed; most often the system was out of memory. Close other "
            "programs or use --jobs 1, and run the same command again: what was finished is kept."
        ) from None
    finally:
        if waiting:  # stopped or failed: nobody waits for the others
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
    return made


def export_network(
    where: tuple[Path, str | None, str | None], name: str, variant: Variant, limits: Limits, folder: Path, small: bool
) -> dict[str, Any]:
    """One network: traced, checked, compared. Returns what the manifest says of it. Runs in a worker."""
    start = time.perf_counter()
    path, base_model, weights_variant = where
    checkpoint = Checkpoint.open(path, base_model=base_model, variant=weights_variant)
    network = networks(checkpoint)[name]
    module = network.module(variant.dtype)
    file = Path("onnx") / variant.name / f"{name}.onnx"
    with disk_errors(folder):
        (folder / file).parent.mkdir(parents=True)
        to_onnx(network, module, variant, limits, folder / file)
    parity = verify(network, module, folder / file, variant, limits, small)
    cells = checkpoint.sample_size >> (checkpoint.levels - 1)
    return {
        "file": file.as_posix(),
        "precision": str(variant.dtype).removeprefix("torch."),
        "inputs": [port(tap, variant, limits) for tap in network.inputs],
        "outputs": [port(tap, variant, limits) for tap in network.outputs],
        "parity": asdict(parity),
        "flops_per_row": flops_per_row(network, module, {"height": cells, "width": cells}),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _start_worker(parent: int, threads: int) -> None:
    """A worker ends with its build, even if that is killed, and keeps to its share of the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's to answer
    try:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux
        pass
    if os.getppid() != parent:
        os._exit(1)
    import torch

    torch.set_num_threads(threads)
