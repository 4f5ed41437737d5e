"""The notebook: its cells run one after the other in a new process, as a kernel runs them, and show what they say.

Jupyter itself is not installed for that: it would bring some forty packages. The cells use nothing but Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK: dict[str, Any] = json.loads((ROOT / "examples" / "photographs.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]

# Runs the cells in one namespace; then says what they left in it.
KERNEL = """
import json, sys
cells, names = json.loads(sys.stdin.read()), {"__name__": "__main__"}
for number, cell in enumerate(cells, start=1):
    exec(compile(cell, f"cell {number}", "exec"), names)
heads, bodies, drawn = names["heads"], names["bodies"], names["drawn"]
grey = names["shown"](names["by_noses"], controls=names["controls"]).convert("L")
print("LEFT", json.dumps({
    "sizes": [result.images[0].size for result in (heads, bodies, drawn)],
    "heads": [person.notes for person in heads.persons],
    "bodies": [person.notes for person in bodies.persons],
    "boxes": [person.box for person in bodies.persons],
    "rows": dict(heads.rows),
    "colours": len(grey.getcolors(10**6)),
    "kinds": [names["ann"].kind, names["bob"].kind],
}))
"""


def test_the_notebook_is_stored_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)
    assert CELLS and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
    assert not [line for cell in CELLS for line in cell["source"] if line.startswith(("%", "!"))]  # of IPython alone


def test_its_links_resolve() -> None:
    text = "".join(line for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert links and all((ROOT / "examples" / link).is_file() for link in links)


@pytest.mark.long
def test_the_cells_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    cells = json.dumps(["".join(cell["source"]) for cell in CELLS])
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], cwd=tmp_path, env=environment, input=cells, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    left = json.loads(done.stdout.rpartition("LEFT")[2])
    assert left["sizes"] == [[256, 256]] * 3 and left["kinds"] == ["embedding"] * 2
    assert all("nobody of the picture has a body, so the head was drawn" in notes[-1] for notes in left["heads"])
    assert left["bodies"] == [[], []] and left["boxes"] == [None, None]
    assert left["rows"]["unet_decoder"] == left["rows"]["id_patch_branch"] == 20  # two rows in each of ten steps
    assert left["colours"] > 100  # patches on a drawing of one colour
    changes = {
        name: (float(change), rows)
        for name, change, rows in re.findall(
            r"^(.*): the latents change by ([\d.]+) of .*; rows (.*)$", done.stdout, re.M
        )
    }
    assert len(changes) == 4 and all(change > 0.01 for change, _ in changes.values())
    assert "id_patch_branch" not in changes["scale 0"][1] and "id_patch_branch" in changes["scale 0.4"][1]
