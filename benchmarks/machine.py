"""python -m benchmarks.machine: the GPU, the machine and the versions that a measurement here would state.

--json prints one object as the last line of stdout: {"gpu", "capability" ("sm_90"), "driver_problem" (why cuda-core
does not reach the GPU though torch does, or null), "hardware" (as in benchmarks.latency), "versions"}.

Exit status: 0 there is a GPU, 1 there is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import BackendError
from realisid_trt.machine import available_cores

from .measure import hardware, versions


def describe() -> dict[str, Any]:
    """The machine, as JSON values. Raises BackendError if neither cuda-core nor torch reaches a GPU."""
    from realisid_trt.backends.cuda_memory import Gpu, probe

    try:
        cuda, name = probe(0), Gpu(0).name
    except BackendError as error:
        return _by_torch(error)
    found = {"gpu": f"{name}, driver for CUDA {cuda}", "capability": name.rpartition("(")[2].rstrip(")")}
    return {**found, "driver_problem": None, "hardware": hardware(available_cores(), "cuda"), "versions": versions()}


def _by_torch(error: BackendError) -> dict[str, Any]:
    """The machine, as torch reports it. Raises `error` if torch finds no GPU."""
    try:
        import torch
    except ImportError:
        raise error from None
    if not torch.cuda.is_available():
        raise error
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "gpu": f"{name}, torch for CUDA {torch.version.cuda}",
        "capability": f"sm_{major}{minor}",
        "driver_problem": str(error),
        "hardware": hardware(available_cores()) | {"gpu": f"{name}, {memory:.0f} GiB"},
        "versions": versions(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine",
        description="The GPU, the machine and the versions that a measurement here would state.",
        epilog="example:\n  python -m benchmarks.machine --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    options = parser.parse_args(arguments)

    def command() -> Outcome:
        found = describe()
        return Outcome(found, [found["gpu"], *(f"{name} {version}" for name, version in found["versions"].items())])

    return run(command, options.json)


if __name__ == "__main__":
    sys.exit(execute(main))
