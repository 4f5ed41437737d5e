"""The networks of a build, exported and verified in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from realisid_trt.errors import BuildError
from realisid_trt.machine import available_cores

from ..checkpoint import Checkpoint
from ..files import disk_errors
from ..forms import Limits, OnnxForm
from ..networks import networks
from ..to_onnx import port_entry, to_onnx
from ..truth.bisect import explain, on_onnxruntime
from ..truth.flops import flops_per_row
from ..truth.verify import verify
from .processes import belong_to
from .staging import Artifact, Staging

SMALL_BYTES = 2**30  # networks with weights up to this size are exported two at a time


@dataclass(frozen=True)
class Job:
    """One network to export, and all that a worker needs for it.

    artifact, key: its name and key in the staging folder.
    source:        arguments of Checkpoint.open: path, base_model, variant.
    bytes:         of weights that the worker reads.
    bisect:        the error of a failed comparison names the first node that differs.
    """

    artifact: str
    key: str
    source: tuple[Path, Path | str | None, str | None]
    network: str
    form: OnnxForm
    limits: Limits
    bytes: int
    bisect: bool = False


def export_all(staging: Staging, jobs: Sequence[Job], workers: int | None, progress: bool) -> dict[str, Artifact]:
    """Exports and verifies the networks, largest first. Returns the artifacts by name.

    Each is added to the staging folder as soon as it is verified, so that nothing is lost when the next one fails.
    Raises BuildError or ParityError.
    """
    if not jobs:
        return {}
    small = max(job.bytes for job in jobs) <= SMALL_BYTES
    workers = min(len(jobs), workers or (min(2, available_cores()) if small else 1))
    threads = max(1, available_cores() // workers)
    made: dict[str, Artifact] = {}
    waiting: dict[Future[dict[str, Any]], tuple[Job, Path]] = {}
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(os.getpid(), threads))
    bar = tqdm(total=len(jobs), desc="networks", unit="network", disable=not progress)
    try:
        for job in sorted(jobs, key=lambda job: -job.bytes):
            folder = staging.workspace(job.artifact.replace(":", "-"))
            waiting[pool.submit(export_network, job, folder)] = job, folder
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                job, folder = waiting.pop(future)
                info = future.result()
                made[job.artifact] = staging.add(job.artifact, job.key, folder, info)
                bar.set_postfix_str(f"{job.network} in {info['seconds']:.0f} s")
                bar.update()
    except BrokenProcessPool:
        names = ", ".join(sorted({job.network, *(other.network for other, _ in waiting.values())}))
        raise BuildError(
            f"a process that exported one of {names} was killed; most often the system was out of memory. Close other "
            "programs or use --jobs 1, and run the same command again: what was finished is kept."
        ) from None
    finally:
        if waiting:  # stopped or failed: the other results are not needed
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
    return made


def export_network(job: Job, folder: Path) -> dict[str, Any]:
    """One network: traced, checked, compared. Returns its entry of the manifest. Runs in a worker."""
    start = time.perf_counter()
    path, base_model, variant = job.source
    checkpoint = Checkpoint.open(path, base_model=base_model, variant=variant)
    network = networks(checkpoint)[job.network]
    module = network.module(job.form.dtype)
    file = Path("onnx") / job.form.name / f"{job.network}.onnx"
    with disk_errors(folder):
        (folder / file).parent.mkdir(parents=True)
        to_onnx(network, module, job.form, job.limits, folder / file)
    explained = partial(explain, folder / file, partial(on_onnxruntime, form=job.form)) if job.bisect else None
    parity = verify(network, module, folder / file, job.form, job.limits, explained)
    cells = checkpoint.sample_size >> (checkpoint.levels - 1)
    tokens = checkpoint.max_length + checkpoint.num_id_tokens
    return {
        "file": file.as_posix(),
        "inputs": [port_entry(port, job.form, job.limits) for port in network.inputs],
        "outputs": [port_entry(port, job.form, job.limits) for port in network.outputs],
        "parity": asdict(parity),
        "flops_per_row": flops_per_row(network, module, {"height": cells, "width": cells, "tokens": tokens}),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _start_worker(parent: int, threads: int) -> None:
    """Makes a worker end with its build, and limits torch to the worker's share of the cores."""
    belong_to(parent)
    import torch

    torch.set_num_threads(threads)
