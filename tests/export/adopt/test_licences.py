"""The terms of every source are found, and travel into the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.adopt.licences import licence_of, source_name
from export.checkpoint.licences import read_licences
from realisid_trt.commands.inspect_engine import inspect_engine
from realisid_trt.manifest import MANIFEST, seal

CARDS = {
    "license: apache-2.0": "apache-2.0",
    "tags:\n- a\nlicense: 'openrail++'\nlibrary_name: diffusers": "openrail++",
    "license: [mit, cc-by-4.0]": "mit, cc-by-4.0",
    "license:\n- openrail\n- mit": "openrail, mit",
    "license: other\nlicense_name: insightface-research": "insightface-research",
    "license: other": "other",
    "license: a\x1b[2Jb\x07": "a[2Jb",
    f"license: {'x' * 5000}": "x" * 100,
    "license:": None,
    "tags: license": None,
}


@pytest.mark.parametrize("card", CARDS, ids=range(len(CARDS)))
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_of_a_model_card(card: str, line_end: str, tmp_path: Path) -> None:
    text = f"---\n{card}\n---\n\nlicense: of no meaning here\n"
    (tmp_path / "README.md").write_bytes(text.replace("\n", line_end).encode())
    assert licence_of(tmp_path) == CARDS[card]


def test_of_a_licence_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("license: this is no front matter")
    (tmp_path / "LICENSES").mkdir()
    assert licence_of(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("\n   Apache License\n  Version 2.0\n")
    assert licence_of(tmp_path) == "Apache License (LICENSE.txt)"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---")
    assert licence_of(tmp_path) == "mit"


def test_a_source_has_the_name_by_which_it_is_known(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--xinsir--controlnet-depth" / "snapshots" / "0f3a"
    assert source_name(snapshot) == "xinsir/controlnet-depth"
    assert source_name(tmp_path / "my depth\n") == "my depth"


def test_a_checkpoint_without_lines_has_none(checkpoint_dir: Path) -> None:
    assert read_licences(checkpoint_dir) == []


def test_inspect_prints_them(engine_copy: Path) -> None:
    lines = [
        {"part": "controlnet_openpose", "licence": "apache-2.0", "source": "xinsir/openpose"},
        {"part": "base_model", "licence": None, "source": "SDXL"},
    ]
    manifest = json.loads((engine_copy / MANIFEST).read_text())
    manifest["licences"] = lines
    manifest["seal"] = seal(manifest)
    (engine_copy / MANIFEST).write_text(json.dumps(manifest))
    outcome = inspect_engine(str(engine_copy))
    assert "licence of controlnet_openpose (xinsir/openpose): apache-2.0" in outcome.lines
    assert "licence of base_model (SDXL): no licence was found: ask its publisher" in outcome.lines
    values: dict[str, Any] = outcome.values
    assert values["licences"] == lines
