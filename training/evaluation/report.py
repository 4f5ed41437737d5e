"""Tables as JSON → pages and plots for people: README.md beside them, and a PNG for each question over a scale."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realisid_trt.errors import RequestError
from realisid_trt.files import whole_or_not

from ..statistics import METHOD, surely
from .experiments import CEILING, EXPERIMENTS, FACE_CELLS, FLOOR, FULL, PEOPLE, PERSONS, TRUTH

Table = Mapping[str, Any]
COLUMNS = (  # title, group and key of a row's values
    ("identity (cosine)", "means", "similarity"), ("of a true render's", "of truth", "similarity"),
    ("rank 1 of 9", "means", "rank1"), ("of the ceiling's", "of ceiling", "rank1"), ("box IoU", "means", "iou"),
    ("landmark error", "means", "landmarks"), ("mouth error", "means", "mouth"), ("harmony", "means", "harmony"),
    ("text", "means", "text"),
)  # fmt: skip
MORE = (  # in a second table
    ("rank 1 of 4 siblings", "sibling"), ("nearer than neighbours", "neighbour"), ("face found", "found"),
    ("right number of faces", "number"), ("brow error", "brow"), ("neck", "neck"), ("shirt", "shirt"),
    ("place", "place"), ("drawn", "drawn"), ("identity there", "drawn_similarity"), ("rank 1 there", "drawn_rank1"),
    ("harmony there", "drawn_harmony"),
)  # fmt: skip
DIFFERENCES = (
    "similarity", "rank1", "sibling", "iou", "landmarks", "mouth", "harmony", "drawn_similarity", "drawn_rank1",
    "drawn_harmony", "text", "kid",
)  # fmt: skip
BETWEEN_WORDS = {
    "table3-growth": (
        "How much the full model's lead grows from faces of 1/4 to faces of 1/8 (in an error, a lead is negative)",
        ("similarity", "rank1", "sibling", "iou", "landmarks"),
    ),
    "persons-kept": ("Identity with three people, as a share of that with one", ("rank1", "similarity")),
    "persons-kept-others": ("The same for forty other people", ("rank1", "similarity")),
}
WORDS = """\
These tables show how well the drawn people of `training/world` come out. No training saw these people, poses, scenes
and noise; the captions use the same few words, and the boxes lie on the same grid. Four small nets judge the pictures.
They were trained on true renders alone: pictures that the drawn world itself makes of a scene.

- *identity*: cosine between the recogniser's embeddings of the face in the requested box and of true renders of the
  person in other scenes. *of a true render's*: this cosine, divided by that of true renders of the same scene.
- *rank 1*: share of faces that the recogniser takes for the right one of nine people. *of the ceiling's*: this share,
  divided by that of true renders passed through the VAE. *siblings*: against three people of the same skin, hair and
  beard. *neighbours*: against the other people in the picture.
- *landmark*, *mouth* and *brow error*: distances from the true pose, divided by the side of the face. They are measured
  on faces that were found.
- *harmony*: share of necks and shirts under the face that have the right colour (a neck has the face's colour).
- All of these are measured at the requested box. *drawn*: share of persons for whom a face was found anywhere in the
  picture, the nearest one if none is in the box. *identity*, *rank 1* and *harmony there* are of that face.
- *text*: share of pictures with the place, the number of people and all the colours of the caption. It does not matter
  which person wears a colour.
- *Fréchet*: distance of the classifier's features to those of true renders of the same people and captions in other
  scenes. It has a bias, so compare rows of one table only. *kid*: such a distance without a bias.
- *true renders of somebody else*: other people in other poses at the same boxes, with the same words. The full model
  should beat them in the measures of the person: identity, rank 1, neck, and errors of landmarks, mouth and brows. They
  have the rest right.

Brackets hold 95 % intervals. A difference in bold is surely not zero: its interval still excludes zero after it was
widened for all differences of its table, so that all of them hold together with 95 % (Bonferroni). Each design was
trained once: the intervals say nothing about another training."""
SUMMED = """\
An interval is computed from the variance of people, plus that of pictures, less that of single values, with Student's
t. The interval of *kid* is a jackknife over pictures, in which pictures that share a person are not independent.
`NAME.npz` beside a table holds its figures, for every person in every picture."""
RESAMPLED = """\
The intervals are older: a bootstrap over people, or over pictures where that is wider (for *kid*, a jackknife over
people). With one person in a picture, as here, they contain the truth 94 times in 100. Figures of single pictures were
not kept."""


def write_report(folder: Path) -> None:
    """Writes README.md and the plots of all tables in the folder. README.md begins with about.md, if there is one.

    Raises RequestError for a file that is not a table.
    """
    found = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
    tables = {name: found[name] for name in EXPERIMENTS if name in found}
    older = {name for name, table in found.items() if table.get("intervals") != METHOD}
    all_older = len(older) == len(found)
    about = folder / "about.md"
    lines = ["# Evaluation tables", ""]
    lines += [about.read_text(encoding="utf-8").strip(), ""] if about.is_file() else []
    lines += [WORDS, "", RESAMPLED if all_older else SUMMED, ""]
    made = list(dict.fromkeys(made_of(table) for table in tables.values()))
    lines += [made[0], ""] if len(made) == 1 else []
    for name, draw, words in (
        ("sizes", _draw_sizes, "Identity and location over the size of the face, beside the baselines"),
        ("guidance", _draw_guidance, "Identity and text over λi and over the delay α"),
        ("persons", _draw_persons, "Identity and location over the number of people, faces of one size"),
        ("samplers", _draw_samplers, "Identity, place, text and harmony over the steps, by sampler"),
    ):
        if draw(tables, folder / f"{name}.png"):
            lines += [f"![{words}]({name}.png)", ""]
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)
    for name, table in tables.items():
        lines += [*markdown(table), "", *_more(table), "", *_differences(table)]
        lines += [
            f"{row}: {mean:.2f} of 255 levels away from the full model's pictures, the farthest picture {worst:.2f}."
            for row, (mean, worst) in table.get("levels", {}).items()
        ]
        lines += [f"Left out: {row}, {why}." for row, why in table["left_out"].items()]
        lines += [made_of(table)] if len(made) > 1 else []
        lines += ["", RESAMPLED] if name in older and not all_older else []
        lines += [""]
    for name, (title, head) in BETWEEN_WORDS.items():
        if name in found:
            table, differences = found[name], not name.startswith("persons-kept")
            lines += [f"**{title}**", "", *_grid(head, table["rows"], people_of(table) if differences else None), ""]
            lines += [RESAMPLED, ""] if name in older and not all_older else []
    with whole_or_not(folder / "README.md") as partial:
        partial.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _read(path: Path) -> Table:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        made_of(table)
        return dict(table, rows=table["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} is not a table of this version ({error}). Take it out of {path.parent}.") from error


def made_of(table: Table) -> str:
    """How its pictures were made, in one sentence."""
    made = table["made"]
    ran, training = made["backend"], made["training"]
    trained = ""
    if training is not None:
        before = "" if training["new"] else ", after an earlier training"
        trained = f" The branches: {training['steps']} steps of {training['batch_size']}{before}."
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    unless = " unless the row says otherwise" if any(" steps" in name for name in table["rows"]) else ""
    return (
        f"{made['steps']} steps of DDIM{unless}, λt {made['guidance_scale']}, λi {made['id_guidance_scale']}, α "
        f"{made['subject_conditioning_ratio']}; the engine: {ran['name']} on {ran['device']}, {ran['precision']} "
        f"({versions}).{trained}"
    )


def markdown(table: Table) -> list[str]:
    """A table's means. In brackets: half the width of the interval."""
    lines = [f"**{table['title']}**, {table['pictures']} pictures", ""]
    lines += ["| | " + " | ".join([*(title for title, _, _ in COLUMNS), "Fréchet"]) + " |"]
    lines += ["|" + "---|" * (len(COLUMNS) + 2)]
    for name, row in table["rows"].items():
        cells = [_cell(row.get(group, {}).get(key)) for _, group, key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{row['frechet']:.2f}"]) + " |")
    return lines


def _more(table: Table) -> list[str]:
    lines = ["| | " + " | ".join(title for title, _ in MORE) + " |", "|" + "---|" * (len(MORE) + 1)]
    for name, row in table["rows"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(row["means"].get(key)) for _, key in MORE) + " |")
    return lines


def differences_of(table: Table) -> dict[str, Mapping[str, Any]]:
    """Row → measure → [mean, low, high] of its paired difference from the full model, of the rows that are models."""
    return {
        name: row["minus " + FULL]
        for name, row in table["rows"].items()
        if "minus " + FULL in row and name not in (CEILING, TRUTH, FLOOR)
    }


def sure(table: Table, row: str, measure: str) -> bool:
    """Whether this difference from the full model stands in bold."""
    rows = differences_of(table)
    return surely(rows[row][measure], people_of(table), _cells(DIFFERENCES, rows))


def _differences(table: Table) -> list[str]:
    """The paired differences, with their whole intervals; in bold where they are surely not zero."""
    rows = differences_of(table)
    if not rows:
        return []
    return ["Minus the full model, pair by pair:", "", *_grid(DIFFERENCES, rows, people_of(table)), ""]


def people_of(table: Table) -> int:
    """The number of people that a table was made of; older tables do not state it."""
    return int(table.get("people", PEOPLE))


def _grid(keys: Sequence[str], rows: Mapping[str, Mapping[str, Any]], people: int | None) -> list[str]:
    """people: the number of people, for differences, which are bold if surely not zero; None: not differences."""
    cells = _cells(keys, rows)
    lines = ["| | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 1)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_interval(row.get(key), people, cells) for key in keys) + " |")
    return lines


def _cells(keys: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(row.get(key) is not None for row in rows.values() for key in keys)


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    mean, low, high = values
    return f"{mean:.3f}" if low is None else f"{mean:.3f} (±{(high - low) / 2:.3f})"


def _interval(values: Sequence[float] | None, people: int | None, cells: int) -> str:
    if values is None:
        return ""
    mean, low, high = values
    if low is None:
        return f"{mean:.3f}"
    if people is None:
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    words = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{words}**" if surely(values, people, cells) else words


def _draw_sizes(tables: Mapping[str, Table], path: Path) -> bool:
    sizes = {
        name: tables[f"table3-{cells}"]["rows"] for name, cells in FACE_CELLS.items() if f"table3-{cells}" in tables
    }
    rows = [name for name in dict.fromkeys(itertools.chain(*sizes.values())) if name not in (TRUTH, FLOOR)]
    return _draw(
        path,
        "face over the picture's side",
        list(sizes),
        [
            (title, {name: [_of(row.get(name), group, key) for row in sizes.values()] for name in rows})
            for title, group, key in (COLUMNS[0], COLUMNS[2], COLUMNS[4])
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
            for title, group, key in (COLUMNS[0], COLUMNS[2], COLUMNS[4])
        ],
    )


def _draw_samplers(tables: Mapping[str, Table], path: Path) -> bool:
    if "samplers" not in tables:
        return False
    of_steps, made = dict[str, dict[int, Any]](), tables["samplers"]["made"]
    for title, row in tables["samplers"]["rows"].items():
        name, _, steps = title.partition(", ") if title != FULL else ("ddim", "", f"{made['steps']} steps")
        if steps.endswith(" steps"):
            of_steps.setdefault(name, {})[int(steps.split()[0])] = row
    steps = sorted({count for rows in of_steps.values() for count in rows})
    return _draw(
        path,
        "steps",
        [str(count) for count in steps],
        [
            (title, {name: [_of(rows.get(count), group, key) for count in steps] for name, rows in of_steps.items()})
            for title, group, key in (COLUMNS[0], COLUMNS[2], COLUMNS[4], COLUMNS[-2], COLUMNS[-1])
        ],
    )


def _of(row: Mapping[str, Any] | None, group: str, key: str) -> Sequence[float] | None:
    return None if row is None else row[group][key]


Curves = dict[str, list[Sequence[float] | None]]


def _draw(path: Path, axis: str, places: list[str], panels: Sequence[tuple[str, Curves]]) -> bool:
    return _draw_panels(path, [(f"{title} over {axis}", places, curves) for title, curves in panels])


def _draw_panels(path: Path, panels: Sequence[tuple[str, list[str], Curves]]) -> bool:
    """Draws curves with their intervals. Returns False, and draws nothing, if no panel has two points to join."""
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, (title, places, curves) in zip(axes[0], panels, strict=True):
        for number, (name, values) in enumerate(curves.items()):
            known = [(x, value) for x, value in enumerate(values) if value is not None and value[1] is not None]
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
