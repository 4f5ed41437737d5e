"""The figures that the README, docs/benchmark.md and the changelog state are those that were measured and stored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULT: dict[str, Any] = json.loads((ROOT / "benchmarks/results/latency-mid-cpu.json").read_text(encoding="utf-8"))
OPENPOSE: dict[str, Any] = json.loads(
    (ROOT / "benchmarks/results/latency-mid-openpose-cpu.json").read_text(encoding="utf-8")
)
ID_PATCH: dict[str, Any] = json.loads(
    (ROOT / "benchmarks/results/latency-mid-idpatch-cpu.json").read_text(encoding="utf-8")
)
README, PAGE, CHANGELOG = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/benchmark.md", "CHANGELOG.md")
)


def flat(text: str) -> str:
    """The text on one line, as a shell and a reader see it."""
    return " ".join(text.replace("\\\n", " ").split())


@pytest.mark.parametrize("case", RESULT["cases"], ids=lambda case: f"{case['persons']}")
def test_the_table(case: dict[str, Any]) -> None:
    persons = "1 person" if case["persons"] == 1 else f"{case['persons']} persons"
    seconds = [f"{contender['total_ms']['p50'] / 1e3:.1f}" for contender in case["contenders"].values()]
    ratios = [ratio["total"] for ratio in case["ratios"].values()]
    faster = [f"{ratio['median']:.2f}× ({ratio['min']:.2f}–{ratio['max']:.2f})" for ratio in ratios]
    fewer = f"{case['ratios']['naive']['flop']:.2f}× fewer"
    assert f"| {' | '.join([persons, *seconds, *faster, fewer])} |" in PAGE
    assert f"| {' | '.join([persons, *seconds[:3], *faster[:2]])} |" in README  # without naive-no-delay
    assert fewer.split()[0] in README and fewer.split()[0] in flat(PAGE).replace(fewer, "")


@pytest.mark.parametrize("case", OPENPOSE["cases"], ids=lambda case: f"{case['persons']}")
def test_the_table_with_a_controlnet(case: dict[str, Any]) -> None:
    label = "openpose and 1 person" if case["persons"] else "openpose alone"
    seconds = [f"{contender['total_ms']['p50'] / 1e3:.1f}" for contender in case["contenders"].values()]
    ratios = [ratio["total"] for ratio in case["ratios"].values()]
    faster = [f"{ratio['median']:.2f}× ({ratio['min']:.2f}–{ratio['max']:.2f})" for ratio in ratios]
    fewer = f"{case['ratios']['naive']['flop']:.2f}× fewer"
    assert f"| {' | '.join([label, *seconds, *faster, fewer])} |" in PAGE
    assert OPENPOSE["command"] in flat(PAGE)
    for key in ("onnxruntime", "torch"):
        assert OPENPOSE["versions"][key] == RESULT["versions"][key]
    for key in ("cpu", "threads"):
        assert OPENPOSE["hardware"][key] == RESULT["hardware"][key]
    ours, first = (result["versions"]["realisid_trt"] for result in (OPENPOSE, RESULT))
    assert f"version {ours} of this package (the first table: {first})" in flat(PAGE)


@pytest.mark.parametrize("case", ID_PATCH["cases"], ids=lambda case: f"{case['persons']}")
def test_the_table_of_id_patch(case: dict[str, Any]) -> None:
    persons = "1 person" if case["persons"] == 1 else f"{case['persons']} persons"
    seconds = [f"{contender['total_ms']['p50'] / 1e3:.1f}" for contender in case["contenders"].values()]
    ratio = case["ratios"]["naive"]["total"]
    faster = f"{ratio['median']:.2f}× ({ratio['min']:.2f}–{ratio['max']:.2f})"
    fewer = f"{case['ratios']['naive']['flop']:.2f}× fewer"
    assert f"| {' | '.join([persons, *seconds, faster, fewer])} |" in PAGE
    assert case["ratios"]["naive"]["latents_relative_rms"] < 1e-4  # the same picture was made
    assert ID_PATCH["command"] in flat(PAGE) and ID_PATCH["settings"]["baseline"] == "IdPatchPipeline"
    for key in ("onnxruntime", "torch"):
        assert ID_PATCH["versions"][key] == RESULT["versions"][key]
    for key in ("cpu", "threads"):
        assert ID_PATCH["hardware"][key] == RESULT["hardware"][key]
    assert f"by version {ID_PATCH['versions']['realisid_trt']} of this package. *Naive*" in flat(PAGE)


@pytest.mark.parametrize("page", [README, PAGE], ids=["README", "benchmark"])
def test_what_was_measured(page: str) -> None:
    settings, versions, hardware = RESULT["settings"], RESULT["versions"], RESULT["hardware"]
    torch = versions["torch"].partition("+")[0]
    for fact in (
        f"median of {settings['runs']} |",
        f"{hardware['threads']} cores of an {hardware['cpu']}, {RESULT['engine']['precision']}, "
        f"{settings['width']}×{settings['height']} px, {settings['steps']} steps",
        f"ONNX Runtime {versions['onnxruntime']}, torch {torch}.",
    ):
        assert fact in flat(page)


def test_the_command() -> None:
    assert RESULT["command"] in flat(PAGE) and "[The exact commands](docs/benchmark.md)" in README


def test_the_changelog() -> None:
    one, two = (f"{case['ratios']['naive']['total']['median']:.2f}" for case in RESULT["cases"])
    stated = re.findall(r"([\d.]+) times as fast for one person, ([\d.]+) times for two \(([\d-]+)\)", flat(CHANGELOG))
    assert (one, two, RESULT["date"][:10]) in stated
