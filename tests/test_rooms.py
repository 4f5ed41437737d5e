"""The tree can be read: few entries in a folder, no long file, no circle of imports."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("realisid_trt", "export", "training", "benchmarks", "examples")
MOST_ENTRIES, MOST_LINES = 15, 400


def test_the_runtime_is_seen_at_a_glance() -> None:
    names = {path.name for path in (ROOT / "realisid_trt").iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert len(names) <= MOST_ENTRIES, sorted(names)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout knows its files")
def test_every_file_is_read_in_one_sitting() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [ROOT / name for name in listed if name.endswith((".py", ".cu", ".cuh"))]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files if path.is_file()}
    assert [path for path, count in lines.items() if count > MOST_LINES] == []


def test_no_import_comes_back() -> None:
    """Among the imports that run with a module; imports for the type checker alone may be circular."""
    modules = {_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    modules |= {f"realisid_trt.{_name(path)}": path for path in (ROOT / "kernels").rglob("*.py")}
    graph = {name: set(_imported(name, path, modules)) for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, road: tuple[str, ...]) -> None:
        assert name not in road, " → ".join([*road[road.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*road, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        if not isinstance(node, ast.ImportFrom):
            continue
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        whole = [f"{base}.{alias.name}" for alias in node.names]
        yield from (each if each in modules else base for each in whole if each in modules or base in modules)


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    waiting: list[ast.stmt] = list(module.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)) and "TYPE_CHECKING" not in ast.dump(node)[:80]:
            waiting += [child for child in ast.walk(node) if isinstance(child, (ast.Import, ast.ImportFrom))]
