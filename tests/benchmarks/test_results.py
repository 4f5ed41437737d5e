"""The figures that the README and the changelog state are those that were measured and stored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULT: dict[str, Any] = json.loads((ROOT / "benchmarks/results/latency-mid-cpu.json").read_text(encoding="utf-8"))
README, CHANGELOG = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md"))


def flat(text: str) -> str:
    """On one line, as a shell and a reader see it."""
    return " ".join(text.replace("\\\n", " ").split())


@pytest.mark.parametrize("case", RESULT["cases"], ids=lambda case: f"{case['persons']}")
def test_the_table(case: dict[str, Any]) -> None:
    persons = "1 person" if case["persons"] == 1 else f"{case['persons']} persons"
    seconds = [f"{contender['total_ms']['p50'] / 1e3:.1f}" for contender in case["contenders"].values()]
    ratios = [ratio["total"] for ratio in case["ratios"].values()]
    faster = [f"{ratio['median']:.2f}× ({ratio['min']:.2f}–{ratio['max']:.2f})" for ratio in ratios]
    fewer = f"{case['ratios']['naive']['flop']:.2f}× fewer"
    assert f"| {' | '.join([persons, *seconds, *faster, fewer])} |" in README


def test_what_was_measured() -> None:
    settings, versions, hardware = RESULT["settings"], RESULT["versions"], RESULT["hardware"]
    torch = versions["torch"].partition("+")[0]
    for fact in (
        f"p50 of {settings['runs']} |",
        f"{hardware['threads']} cores of an {hardware['cpu']}, {RESULT['engine']['precision']}, "
        f"{settings['width']}×{settings['height']} px, {settings['steps']} steps",
        f"ONNX Runtime {versions['onnxruntime']}, torch {torch}.",
    ):
        assert fact in flat(README)


def test_the_command() -> None:
    assert RESULT["command"] in flat(README)


def test_the_changelog() -> None:
    one, two = (f"{case['ratios']['naive']['total']['median']:.2f}" for case in RESULT["cases"])
    stated = re.findall(r"([\d.]+) times as fast for one person, ([\d.]+) times for two \(([\d-]+)\)", flat(CHANGELOG))
    assert (one, two, RESULT["date"][:10]) in stated
