"""python -m benchmarks.kernels: the bytes that the fused kernels move, and their times beside plain torch operations.

Shapes are SDXL's, half precision: 1, 2, 4 and 8 faces of 1/2, 1/4 and 1/7 of the picture's shorter edge, 1024² and
832×1216 px, one row per picture and the three rows of guidance. guide_step is also timed with one history and noise of
a sampler, and with two histories. Floor: the bytes that must move, at the card's measured copy bandwidth. Without a GPU
it is a dry run: bytes, launches, and floors at --bandwidth.

Beside each kernel stand the torch operations that do the same (F.interpolate, slice-add, mean, add), run eagerly and
captured in a CUDA graph, in the same run on the same memory.

--json prints one object as the last line of stdout, and --out FILE stores the same: {"schema", "date", "command",
"device" (null in a dry run), "fused_left_out" (the reason why only torch was timed, or null), "versions",
"bandwidth_gb_per_s", "shapes" {"canvas", "channels", "skips"}, "cases": [{"kernel", "picture", "faces", "box", "rows",
"histories", "noise", "bytes", "floor_us", "launches", "torch_launches", and, timed: "torch_us", "torch_graph_us", and
of the fused kernel "us", "of_floor"}]}.

The torch operations (torch_operations.py) need nothing but torch. They are timed even if the fused kernels do not run
because cuda-core, or code for the GPU, is missing.

Exit status: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realisid_trt.commands.command_line import Outcome, execute, run
from realisid_trt.errors import RequestError
from realisid_trt.files import whole_or_not

from .cases import CANVAS, CHANNELS, FRACTIONS, SDXL, Case, cases, sampler_cases
from .measure import now, versions

HALF_BYTES, SECTOR_BYTES = 2, 32


def crop_bytes(case: Case) -> int:
    """The bytes of the faces, read in float32, and of the canvases, written in half precision."""
    read = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (case.box(face, 0) for face in range(case.faces)))
    return CHANNELS * (4 * read + HALF_BYTES * case.faces * CANVAS**2)


def merge_bytes(case: Case) -> int:
    """The bytes that the merge reads and writes.

    It reads skips and global residuals once, and those memory sectors of the local residuals that a sample touches. It
    writes all decoder rows.
    """
    total = 0
    for channels, level in SDXL:
        height, width = case.cells(level)
        whole = channels * height * width * HALF_BYTES
        total += whole * (len(set(case.encoder_of)) + case.branch_rows + case.rows)
        side = CANVAS >> level
        for face in range(case.faces):
            x0, y0, x1, y1 = case.box(face, level)
            lines, sectors = _touched(side, y1 - y0, 1), _touched(side, x1 - x0, SECTOR_BYTES // HALF_BYTES)
            total += channels * lines * sectors * SECTOR_BYTES * case.branch_rows // case.faces
    return total


def guide_bytes(case: Case) -> int:
    """The bytes of latents and histories, read and written in float32, of noise, read in float32, and of the
    predictions, read in half precision."""
    height, width = case.cells(0)
    return CHANNELS * height * width * (2 * 4 * (1 + case.histories) + 4 * case.noise + HALF_BYTES * case.rows)


def guide_launches(case: Case) -> int:
    """A product and a sum for each term but the first, which has no sum, in each line of torch_operations.GuideStep."""
    lines = [case.rows, *(sum(value != 0 for value in line) for line in case.matrix[: 1 + case.histories])]
    return sum(2 * terms - 1 for terms in lines)


def _touched(size_in: int, size_out: int, per_group: int) -> int:
    """The number of groups, of `per_group` neighbours each, that a bilinear resize of a line reads."""
    position = np.clip((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0, None)
    first = np.minimum(position.astype(int), size_in - 1)
    return len({cell // per_group for cell in (*first, *np.minimum(first + 1, size_in - 1))})


# kernel → its bytes, and the number of launches of the same in plain torch (a view launches nothing).
KERNELS = {
    "crop_upsample": (crop_bytes, lambda case: case.faces + 1),
    "relocate_merge": (
        merge_bytes,
        # per level: mean, add and stack; per face and distinct set of branch rows: interpolate and add into a slice
        lambda case: len(SDXL) * (len(set(map(tuple, case.branches_of))) * (1 + 2 * case.faces) + case.rows + 1),
    ),
    "guide_step": (guide_bytes, guide_launches),
}


def measure(bandwidth: float, command: Sequence[str] = ()) -> dict[str, Any]:
    """The figures, as JSON values. bandwidth: GB/s, for a dry run; on a GPU the card's own is measured.

    Raises RequestError for an impossible bandwidth.
    """
    if not bandwidth > 0:
        raise RequestError(f"--bandwidth is {bandwidth:g}, expected GB/s above 0.")
    bench = _gpu_bench()
    if bench is not None:
        bandwidth = bench.copy_bandwidth()
    # Two kernels are launch-bound: one shape is enough.
    timed = [
        (kernel, case)
        for case in cases()
        for kernel in KERNELS
        if kernel == "relocate_merge" or (case.rows, case.fraction) == (3, FRACTIONS[0])
    ]
    rows = []
    for kernel, case in [*timed, *(("guide_step", case) for case in sampler_cases())]:
        nbytes, torch_launches = KERNELS[kernel]
        figures: dict[str, Any] = {
            "kernel": kernel,
            "picture": f"{case.width}×{case.height}",
            "faces": case.faces,
            "box": f"1/{case.fraction}",
            "rows": case.rows,
            "histories": case.histories,
            "noise": case.noise,
            "bytes": nbytes(case),
            "floor_us": nbytes(case) / bandwidth / 1e3,
            "launches": 1,
            "torch_launches": torch_launches(case),
        }
        if bench is not None:
            figures |= bench.time(kernel, case)
            if "us" in figures:
                figures["of_floor"] = figures["floor_us"] / figures["us"]
        rows.append(figures)
    return {
        "schema": 1,
        "date": now(),
        "command": shlex.join(["python", "-m", "benchmarks.kernels", *command]),
        "device": bench.device if bench is not None else None,
        "fused_left_out": bench.problem if bench is not None else None,
        "versions": versions(),
        "bandwidth_gb_per_s": bandwidth,
        "shapes": {"canvas": CANVAS, "channels": CHANNELS, "skips": SDXL},
        "cases": rows,
    }


def _gpu_bench() -> Any:
    """The timer of kernels on this machine, or None without a GPU or without torch for it."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    from .gpu_bench import GpuBench
    from .torch_operations import TorchCuda

    return GpuBench(TorchCuda())


def table(result: dict[str, Any]) -> list[str]:
    """The result, as text for people."""
    where = result["device"] or "dry run, no GPU: nothing was timed"
    lines = [f"{where}; floors at {result['bandwidth_gb_per_s']:.0f} GB/s; {result['date']}", ""]
    timed = result["device"] is not None
    head = f"{'kernel':<16}{'picture':>11}{'faces':>6}{'box':>5}{'rows':>5}{'state':>8}{'MB':>9}{'floor µs':>10}"
    head += f"{'launches':>9}{'torch':>7}"
    lines.append(head + (f"{'µs':>9}{'of floor':>9}{'torch µs':>10}{'in graph':>10}" if timed else ""))
    for row in result["cases"]:
        line = f"{row['kernel']:<16}{row['picture']:>11}{row['faces']:>6}{row['box']:>5}{row['rows']:>5}"
        line += f"{row['histories'] or '—'}{'+noise' * row['noise']}".rjust(8)
        line += f"{row['bytes'] / 1e6:>9.2f}{row['floor_us']:>10.2f}{row['launches']:>9}{row['torch_launches']:>7}"
        if timed:
            fused = f"{row['us']:>9.1f}{row['of_floor']:>9.0%}" if "us" in row else f"{'—':>9}{'—':>9}"
            line += f"{fused}{row['torch_us']:>10.1f}{row['torch_graph_us']:>10.1f}"
        lines.append(line)
    if result["fused_left_out"]:
        lines += ["", f"the fused kernels were not timed: {result['fused_left_out']}"]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Bytes, floors, launches and times of the fused kernels; a dry run without a GPU.",
        epilog="""examples:
  python -m benchmarks.kernels
  python -m benchmarks.kernels --json --out kernels.json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bandwidth", type=float, default=4300, help="GB/s of a dry run (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="store the JSON object")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    options = parser.parse_args(arguments)

    def command() -> Outcome:
        result = measure(options.bandwidth, arguments)
        if options.out is not None:
            with whole_or_not(options.out) as partial:
                partial.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
        return Outcome(result, table(result))

    return run(command, options.json)


if __name__ == "__main__":
    sys.exit(execute(main))
