"""Runs → figures → a table for people, and a plot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from realisid_trt.errors import RequestError
from realisid_trt.files import whole_or_not

from .flops import PHASES, UNCOUNTED, PerRow, total_flops
from .measure import RUNTIMES, Run, speed_ratio, spread

CORES = ("cores_busy_elsewhere", "cores_stolen")
FEW = 20  # values: with fewer, a 95th percentile is close to the maximum
SPREAD = f"p50 (p95, or min–max of fewer than {FEW})"
NETWORK = re.compile("^unet_|^controlnet_|_branch$")  # parts of a network's name that the table leaves out
Case = dict[str, Any]
# The stages of a plot's bars that every engine has, and of its baselines → matplotlib's colour. Branches stand between.
BEFORE = {"text": ("text",), "conditions, time": ("persons", "conditions", "time")}
AFTER = {
    "UNet": ("denoise.unet_encoder", "denoise.unet_decoder", "denoise.unet"),
    "between networks": tuple(
        f"denoise.{name}" for name in ("crop_upsample", "relocate_merge", "guide_step", "crop", "merge", "guidance")
    ),
    "VAE": ("vae",),
}
BRANCH_STAGE = re.compile(r"denoise\.(?:controlnet_(\w+)|(\w+)_branch)")
COLOURS = {
    "text": "C0", "conditions, time": "C1", "local branch": "C2", "global branch": "C3", "UNet": "C4",
    "between networks": "C5", "VAE": "C6",
}  # fmt: skip


def summarise(
    persons: int,
    taken: Mapping[str, Sequence[Run]],
    differences: Mapping[tuple[str, str], float],
    switch: int,
    per_row: PerRow,
) -> Case:
    """One case of the JSON object.

    taken:       contender → its runs.
    differences: (engine, baseline) → relative RMS of the latents' difference.
    switch:      steps without the ID. per_row: operations per row of every network, by phase; empty: not known.
    """
    switch = switch if persons else len(next(iter(taken.values()))[0].step_ms)
    contenders = {name: _contender(runs, switch, per_row) for name, runs in taken.items()}
    ratios = {}
    for (engine, baseline), difference in differences.items():
        ours, theirs = taken[engine], taken[baseline]
        ratios[baseline if engine == "engine" else f"{baseline} / {engine}"] = {
            "engine": engine,
            "baseline": baseline,
            "total": speed_ratio([run.total_ms for run in theirs], [run.total_ms for run in ours]),
            "denoise": speed_ratio([run.stages["denoise"] for run in theirs], [run.stages["denoise"] for run in ours]),
            "flop": contenders[baseline]["tflop"] / contenders[engine]["tflop"] if per_row else None,
            "latents_relative_rms": difference,
        }
    return {"persons": persons, "contenders": contenders, "ratios": ratios}


def _contender(runs: Sequence[Run], switch: int, per_row: PerRow) -> dict[str, Any]:
    total = spread([run.total_ms for run in runs])
    stages = {stage: spread([run.stages[stage] for run in runs]) for stage in runs[0].stages}
    rows, step_rows = runs[-1].rows, runs[-1].step_rows
    parts = {"without_id": slice(None, switch), "with_id": slice(switch, None)}
    phase_ms = {phase: [ms for run in runs for ms in run.step_ms[part]] for phase, part in parts.items()}
    phase_rows = {phase: next(iter(step_rows[part]), None) for phase, part in parts.items()}
    counted = _operations(rows, step_rows[:switch], per_row)
    tflop = sum(counted.values()) / 1e12 if per_row else None
    names = {stage: stage.removeprefix("denoise.") for stage in stages}
    return {
        "total_ms": total,
        "stages_ms": stages,
        "step_ms": {phase: spread(ms) if ms else None for phase, ms in phase_ms.items()},
        "step_ms_runs": [list(run.step_ms) for run in runs],
        **{name: spread([run.cores[name] for run in runs]) if runs[0].cores else None for name in CORES},
        "rows": dict(rows),
        "step_rows": phase_rows,
        "tflop": tflop,
        "step_tflop": {
            phase: total_flops(rows, per_row[phase]) / 1e12 if rows is not None and per_row else None
            for phase, rows in phase_rows.items()
        },
        "gflop_per_s": tflop * 1e6 / total["p50"] if tflop is not None else None,
        "stage_gflop_per_s": {
            stage: counted[name] / 1e6 / stages[stage]["p50"] for stage, name in names.items() if name in counted
        },
    }


def _operations(rows: Mapping[str, int], early: Sequence[Mapping[str, int]], per_row: PerRow) -> dict[str, int]:
    """Network → the operations of its rows in a picture. early: the rows of each step without the ID.

    Raises KeyError for a network without a count, which would count as zero.
    """
    counted = {}
    for name, count in rows.items() if per_row else ():
        if name not in UNCOUNTED:
            before = sum(step.get(name, 0) for step in early)
            by_phase = {"without_id": before, "with_id": count - before}
            counted[name] = sum(total_flops({name: n}, per_row[phase]) for phase, n in by_phase.items())
    return counted


def table(result: Mapping[str, Any]) -> str:
    """The result, as text for people."""
    hardware, settings, on_gpu = result["hardware"], result["settings"], " on cuda" in result["engine"]["backend"]
    ram = f", {hardware['ram_bytes'] / 2**30:.0f} GiB" if hardware["ram_bytes"] else ""
    known = (*RUNTIMES, "torch", "diffusers")
    has_persons = any(case["persons"] for case in result["cases"])
    lines = [hardware["gpu"]] if hardware["gpu"] else []
    lines += [
        f"{result['engine']['name']}: {result['engine']['backend']}, {result['engine']['precision']}; {result['date']}",
        f"{hardware['cpu']}, {hardware['threads']} threads on {hardware['cores_available']} cores{ram}; "
        + ", ".join(f"{name} {result['versions'][name]}" for name in known if name in result["versions"]),
        f"{settings['width']}×{settings['height']} px, {settings['steps']} steps of {settings['sampler']}"
        + (f", {settings['steps_without_id']} of them without the ID" if has_persons else "")
        + f"; {settings['runs']} interleaved runs after {settings['warmup']}; ms, {SPREAD}",
    ]
    for case in result["cases"]:
        lines += ["", *_case_lines(case, on_gpu)]
    lines += [f"{backend} is left out: {reason}" for backend, reason in result["left_out"].items()]
    if result["photo"]:
        lines += ["", f"once per new photo, ms, {SPREAD}"]
        lines += [f"  {stage:<20}{_spread(ms)}" for stage, ms in result["photo"].items()]
    return "\n".join(lines)


def _case_lines(case: Case, on_gpu: bool) -> list[str]:
    contenders: Mapping[str, Any] = case["contenders"]
    rows: list[list[str]] = [[_persons(case["persons"]), *contenders]]

    def add(label: str, cells: Sequence[str]) -> None:
        rows.append([label, *cells])

    add("total", [_spread(c["total_ms"]) for c in contenders.values()])
    stages = dict.fromkeys(stage for c in contenders.values() for stage in c["stages_ms"])
    for stage in sorted(stages, key=lambda stage: list(stages).index(stage.partition(".")[0])):
        label = "  " * (1 + stage.count(".")) + stage.rpartition(".")[2]
        add(label, [_spread(c["stages_ms"].get(stage)) for c in contenders.values()])
    for phase, label in zip(PHASES, ("step without ID", "step with ID"), strict=True):
        if any(c["step_ms"][phase] for c in contenders.values()):
            add(label if case["persons"] else "step", [_spread(c["step_ms"][phase]) for c in contenders.values()])
            add("  rows", [_rows(c["step_rows"][phase]) for c in contenders.values()])
            add("  TFLOP", [_number(c["step_tflop"][phase]) for c in contenders.values()])
    for name in CORES:
        add(name.replace("_", " "), [_spread(c[name]) for c in contenders.values()])
    add("TFLOP", [_number(c["tflop"]) for c in contenders.values()])
    speeds = [c["gflop_per_s"] for c in contenders.values()]
    if on_gpu:
        add("TFLOP/s", [_number(None if speed is None else speed / 1e3) for speed in speeds])
    else:
        add("GFLOP/s", [_number(speed) for speed in speeds])
    for key in ("resting_memory_bytes", "peak_memory_bytes"):
        label = key.removesuffix("_bytes").replace("_", " ") + ", GiB"
        add(label, [_number(c[key] / 2**30) if c.get(key) else "" for c in contenders.values()])
    for engine in dict.fromkeys(ratio["engine"] for ratio in case["ratios"].values()):
        beside = {ratio["baseline"]: ratio for ratio in case["ratios"].values() if ratio["engine"] == engine}
        ratios = [beside.get(name, {}) for name in contenders]
        for key, label in (("total", f"{engine} is faster by"), ("denoise", "  in the loop by")):
            shown = [r.get(key) for r in ratios]
            add(label, ["" if r is None else f"{r['median']:.2f}× ({_range(r, 2)})" for r in shown])
        add("  in operations by", [_number(r.get("flop"), "×") for r in ratios])
        apart = [r.get("latents_relative_rms") for r in ratios]
        add("  latents differ by", ["" if value is None else f"{value:.1e}" for value in apart])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        if any(cells):
            aligned = (f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            lines.append((label.ljust(widths[0]) + "".join(aligned)).rstrip())
    return lines


def _persons(count: int) -> str:
    return f"{count} person{'' if count == 1 else 's'}"


def _spread(ms: Mapping[str, float] | None) -> str:
    if ms is None:
        return ""
    return f"{ms['p50']:.1f} ({ms['p95']:.1f})" if ms["count"] >= FEW else f"{ms['p50']:.1f} ({_range(ms, 1)})"


def _range(values: Mapping[str, float], digits: int) -> str:
    return f"{values['min']:.{digits}f}–{values['max']:.{digits}f}"


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.3g}{unit}" if value < 1000 else f"{value:.0f}{unit}"


def _rows(rows: Mapping[str, int] | None) -> str:
    """Rows of a step in the order of the step, such as "local 2, global 2, encoder 2, decoder 3"."""
    return ", ".join(f"{NETWORK.sub('', name)} {count}" for name, count in (rows or {}).items())


def check_plot(path: Path) -> None:
    """Raises RequestError before the measurement if a plot cannot be drawn after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError("--plot needs matplotlib, which is not installed. pip install 'realisid_trt[dev]'") from None
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise RequestError(f"--plot {path}: expected a file that ends in .png, .svg or .pdf.")


def families(result: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """One colour of the plot → the stages of the engines, and of the baselines, that do this work.

    Every branch that was evaluated has its own, in the order of the table.
    """
    stages = [list(contender["stages_ms"]) for case in result["cases"] for contender in case["contenders"].values()]
    found = (BRANCH_STAGE.fullmatch(stage) for each in sorted(stages, key=len, reverse=True) for stage in each)
    names = dict.fromkeys(match[1] or match[2] for match in found if match)  # the most stages: with all branches
    branches = {f"{name} branch": (f"denoise.{name}_branch", f"denoise.controlnet_{name}") for name in names}
    return {**BEFORE, **branches, **AFTER}


def colours_of(labels: Iterable[str]) -> dict[str, str]:
    """Label → matplotlib's colour: the same in every plot, and the remaining ones for further branches, in turn."""
    labels = list(labels)
    others = [f"C{number}" for number in range(10) if f"C{number}" not in COLOURS.values()]
    further = [label for label in labels if label not in COLOURS]
    turns = {label: others[place % len(others)] for place, label in enumerate(further)}
    return {label: COLOURS.get(label) or turns[label] for label in labels}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Per case: milliseconds of every step, and of every stage stacked. Raises DiskError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases, stages_of = result["cases"], families(result)
    colours = colours_of(stages_of)
    figure = Figure(figsize=(11, 3.6 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        by_step, by_stage = axes
        for name, contender in case["contenders"].items():
            medians = [spread(step)["p50"] for step in zip(*contender["step_ms_runs"], strict=True)]
            by_step.plot(range(1, len(medians) + 1), medians, marker=".", label=name)
        by_step.set(title=f"{_persons(case['persons'])}: every step", xlabel="step", ylabel="ms", ylim=(0, None))
        by_step.legend(loc="lower right")
        left = dict.fromkeys(case["contenders"], 0.0)
        for label, stages in stages_of.items():
            widths = [
                sum(c["stages_ms"][stage]["p50"] for stage in stages if stage in c["stages_ms"])
                for c in case["contenders"].values()
            ]
            by_stage.barh(list(left), widths, left=list(left.values()), label=label, color=colours[label])
            left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
        by_stage.set(title="every stage", xlabel="ms per picture")
        by_stage.invert_yaxis()
    legend = figure.axes[1].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=min(len(stages_of), 8), fontsize="small")
    with whole_or_not(path) as partial:
        figure.savefig(partial, dpi=120)
