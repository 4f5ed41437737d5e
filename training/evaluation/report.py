"""Tables as JSON → pages and plots for people: README.md, sizes.png, guidance.png and persons.png beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realisid_trt.files import whole_or_not

from .experiments import CEILING, EXPERIMENTS, FACE_CELLS, FULL, PERSONS

Table = Mapping[str, Any]
COLUMNS = (  # title, group and key of a row's values
    ("identity (cosine)", "means", "similarity"), ("rank 1 of 9", "means", "rank1"),
    ("of the ceiling's", "of ceiling", "rank1"), ("box IoU", "means", "iou"),
    ("landmark error", "means", "landmarks"), ("mouth error", "means", "mouth"), ("harmony", "means", "harmony"),
    ("text", "means", "text"),
)  # fmt: skip
DIFFERENCES = ("similarity", "rank1", "iou", "landmarks", "mouth", "harmony", "text", "frechet")
WORDS = """\
Every number with its 95 % interval (bootstrap over people).

- *identity*: cosine of the recogniser's embedding with the person's own.
- *rank 1*: share of faces that the recogniser takes for the right one of nine people; *of the ceiling's*: over the same
  share of true renders passed through the VAE.
- *landmark* and *mouth error*: over the face's side.
- *harmony*: share of necks and shirts right under the face that have the right colour.
- *text*: share of pictures that show all that the caption says, by the attribute classifier.
- *Fréchet*: distance to the true renders through the VAE, of that classifier's features."""


def write_report(folder: Path) -> None:
    """README.md and the plots, of all tables that lie in the folder."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    tables = {name: found[name] for name in EXPERIMENTS if name in found}
    plots = [
        (name, words)
        for name, draw, words in (
            ("sizes", _draw_sizes, "Identity over the size of the face, beside the baselines"),
            ("guidance", _draw_guidance, "Identity and text over λi and over the delay α"),
            ("persons", _draw_persons, "Identity and location over the number of people, faces of one size"),
        )
        if draw(tables, folder / f"{name}.png")
    ]
    lines = ["# What was measured", "", WORDS, ""]
    if tables:
        lines += [made_of(next(iter(tables.values()))), ""]
    for name, words in plots:
        lines += [f"![{words}]({name}.png)", ""]
    for table in tables.values():
        lines += [*markdown(table), "", *_differences(table), ""]
    for name, (title, head) in BETWEEN.items():
        if name in found:
            lines += [f"**{title}**", "", *_grid(head, {k: v for k, v in found[name].items() if k != "made"}), ""]
    with whole_or_not(folder / "README.md") as partial:
        partial.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


BETWEEN = {
    "table3-growth": (
        "How much the full model's lead grows from faces of 8 cells to faces of 4",
        ("similarity", "rank1", "iou", "landmarks"),
    ),
    "persons-kept": ("Three people over one: what is left of identity", ("rank1", "similarity")),
}


def made_of(table: Table) -> str:
    """How its pictures were made, in one sentence."""
    made = table["made"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"{made['steps']} steps of DDIM, λt {made['guidance_scale']}, λi {made['id_guidance_scale']}, α "
        f"{made['subject_conditioning_ratio']}; the engine on ONNX Runtime ({versions})."
    )


def markdown(table: Table) -> list[str]:
    """A table's means. What stands in brackets is half the width of the interval."""
    lines = [f"**{table['title']}**, {table['pictures']} pictures", ""]
    lines += ["| | " + " | ".join([*(title for title, _, _ in COLUMNS), "Fréchet"]) + " |"]
    lines += ["|" + "---|" * (len(COLUMNS) + 2)]
    for name, row in table["rows"].items():
        cells = [_cell(row.get(group, {}).get(key)) for _, group, key in COLUMNS]
        distance = row.get("frechet")
        lines.append(f"| {name} | " + " | ".join([*cells, "" if distance is None else f"{distance:.2f}"]) + " |")
    return lines


def _differences(table: Table) -> list[str]:
    """The paired differences, with their whole intervals; in bold where zero lies outside."""
    rows = {
        name: row["minus " + FULL]
        for name, row in table["rows"].items()
        if "minus " + FULL in row and name not in (CEILING, "true renders")
    }
    return ["Minus the full model, pair by pair:", "", *_grid(DIFFERENCES, rows)] if rows else []


def _grid(keys: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 1)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_interval(row.get(key)) for key in keys) + " |")
    return lines


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    mean, low, high = values
    return f"{mean:.3f} (±{(high - low) / 2:.3f})"


def _interval(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    mean, low, high = values
    words = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if min(low, mean) < 0 else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    return f"**{words}**" if low > 0 or high < 0 else words


def _draw_sizes(tables: Mapping[str, Table], path: Path) -> bool:
    sizes = {
        name: tables[f"table3-{cells}"]["rows"] for name, cells in FACE_CELLS.items() if f"table3-{cells}" in tables
    }
    rows = [name for name in next(iter(sizes.values()), {}) if name != "true renders"]
    return _draw(
        path,
        "face over the picture's side",
        list(sizes),
        [
            (title, {name: [_of(row.get(name), group, key) for row in sizes.values()] for name in rows})
            for title, group, key in (COLUMNS[0], COLUMNS[1], COLUMNS[3])
        ],
    )


def _draw_guidance(tables: Mapping[str, Table], path: Path) -> bool:
    panels = []
    for name, sign in (("null-id", "λi"), ("delay", "α")):
        if name in tables:
            rows = {row.split()[-1]: values for row, values in tables[name]["rows"].items() if row.startswith(sign)}
            for title, group, key in (COLUMNS[0], COLUMNS[-1]):
                panels.append((f"{title} over {sign}", list(rows), {FULL: [_of(v, group, key) for v in rows.values()]}))
    return _draw_panels(path, panels)


def _draw_persons(tables: Mapping[str, Table], path: Path) -> bool:
    names = [f"persons-{number}-apart" for number in PERSONS if f"persons-{number}-apart" in tables]
    rows = [tables[name]["rows"] for name in names]
    return _draw(
        path,
        "people",
        [name.split("-")[1] for name in names],
        [
            (title, {name: [_of(row.get(name), group, key) for row in rows] for name in (FULL, CEILING)})
            for title, group, key in (COLUMNS[0], COLUMNS[1], COLUMNS[3])
        ],
    )


def _of(row: Mapping[str, Any] | None, group: str, key: str) -> Sequence[float] | None:
    return None if row is None else row[group][key]


Curves = dict[str, list[Sequence[float] | None]]


def _draw(path: Path, axis: str, places: list[str], panels: Sequence[tuple[str, Curves]]) -> bool:
    return _draw_panels(path, [(f"{title} over {axis}", places, curves) for title, curves in panels])


def _draw_panels(path: Path, panels: Sequence[tuple[str, list[str], Curves]]) -> bool:
    """Curves with their intervals, one panel each; nothing if there are not two places to join."""
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, (title, places, curves) in zip(axes[0], panels, strict=True):
        for number, (name, values) in enumerate(curves.items()):
            known = [(x, value) for x, value in enumerate(values) if value is not None]
            x = [place + 0.06 * (number - len(curves) / 2) for place, _ in known]
            mean, low, high = zip(*(value for _, value in known), strict=True) if known else ((), (), ())
            errors = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
            axis.errorbar(x, mean, yerr=errors, marker="o", markersize=4, capsize=3, linewidth=1.3, label=name)
        axis.set_xticks(range(len(places)), places)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    if len(panels[0][2]) > 1:
        axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    with whole_or_not(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
    pyplot.close(figure)
    return True
