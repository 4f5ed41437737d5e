"""NVRTC: every architecture without a GPU, errors with the compiler's log, names that say what is inside."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cuda.bindings
import pytest

from realisid_trt.errors import BuildError
from realisid_trt.kernels import compile as compiling

ENTRIES = 3 * 8 + 2  # kernels.cu: eight for each number type, take from float32


def test_every_architecture(compiled: tuple[Path, list[str]]) -> None:
    folder, names = compiled
    assert [name.split(".", 1)[1] for name in names] == [
        *(f"{architecture}.cubin" for architecture in compiling.ARCHITECTURES),
        "compute_120.ptx",
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)  # and nothing half-written
    entries = set(re.findall(r"\.visible \.entry (\w+)\(", (folder / names[-1]).read_text()))
    assert len(entries) == ENTRIES
    for name in names[:-1]:
        code = (folder / name).read_bytes()
        assert code.startswith(b"\x7fELF")
        assert all(f".text.{entry}\0".encode() in code for entry in entries)


def test_names_change_with_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    before, texts = compiling.key(), compiling.sources()
    assert compiling.key() == before
    monkeypatch.setattr(compiling, "sources", lambda: texts | {"rows.cuh": texts["rows.cuh"] + "\n"})
    assert compiling.key() != before
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "OPTIONS", (*compiling.OPTIONS, "--use_fast_math"))
    assert compiling.key() != before


@pytest.mark.parametrize("architecture, vectors", [("compute_90", ("v4.f32", "v4.u32")), ("compute_120", ("v4.b32",))])
def test_the_arithmetic_of_the_source_is_what_is_compiled(architecture: str, vectors: tuple[str, ...]) -> None:
    """Divisions are IEEE's, halves go 16 bytes at a time, and every load knows its memory."""
    ptx = compiling.compile_for(architecture).decode()
    assert "div.rn.f32" in ptx and "div.approx" not in ptx and ".ftz" not in ptx
    bodies = dict(zip(*[iter(re.split(r"\.visible \.entry (\w+)\(", ptx)[1:])] * 2, strict=True))
    for dtype, vector in (("float32", vectors[0]), ("float16", vectors[-1]), ("bfloat16", vectors[-1])):
        for mode in ("bilinear", "area"):
            body = bodies[f"relocate_merge_{mode}_{dtype}"]
            # skips, a residual everywhere, one inside its box
            assert body.count(f"ld.global.{vector}") >= 3 and f"st.global.{vector}" in body
            assert not re.search(r"st\.global\.(?!v4)", body)
            assert not re.search(r"\b(ld|st)\.(?!param|global)", body)  # generic or local: slower
            assert ".local" not in body
        assert not re.search(r"\b(ld|st)\.(?!param|global)|\.local", bodies[f"guide_step_{dtype}"])


def test_an_error_carries_the_compilers_log() -> None:
    texts = compiling.sources()
    texts["rows.cuh"] += "\n__device__ int broken() { return undeclared; }\n"
    with pytest.raises(BuildError, match=r"(?s)sm_90: .*rows\.cuh.*\"undeclared\" is undefined"):
        compiling.compile_for("sm_90", texts)


def test_an_architecture_that_nvrtc_does_not_know() -> None:
    with pytest.raises(
        BuildError, match=r"(?s)NVRTC \d+\.\d+ does not compile the kernels for sm_10:.*gpu-architecture"
    ):
        compiling.compile_for("sm_10")


def test_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install = re.escape("pip install 'realisid_trt[export]'")

    def not_found() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so"')

    compiling._nvrtc.cache_clear()
    monkeypatch.setattr(cuda.bindings.nvrtc, "nvrtcVersion", not_found)
    with pytest.raises(BuildError, match=f"nvidia-cuda-nvrtc is not installed.*libnvrtc.*{install}"):
        compiling.compile_kernels(tmp_path)
    monkeypatch.undo()
    monkeypatch.delattr(cuda.bindings, "nvrtc")
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(BuildError, match=f"cuda-bindings is not installed.*{install}"):
        compiling.compile_kernels(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_compiled_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVRTC: the cubin of these sources, whichever release made it; not that of others, nor another GPU's."""
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    here.mkdir()
    [name] = compiling.compile_elsewhere(elsewhere, ["sm_90"])
    monkeypatch.setattr(compiling, "_nvrtc", _no_nvrtc)
    with pytest.raises(BuildError, match="^no NVRTC$"):
        compiling.compile_kernels(here, ["sm_90"])
    monkeypatch.setenv(compiling.CUBINS, str(elsewhere))
    [copied] = compiling.compile_kernels(here, ["sm_90"])
    assert (here / copied).read_bytes() == (elsewhere / name).read_bytes()
    with pytest.raises(
        BuildError, match=f"no NVRTC {compiling.CUBINS}=.* does not hold these kernels for sm_80 either"
    ):
        compiling.compile_kernels(here, ["sm_80"])
    monkeypatch.setattr(compiling, "OPTIONS", ("--std=c++20",))
    with pytest.raises(BuildError, match="these kernels for sm_90"):
        compiling.compile_kernels(here, ["sm_90"])


def _no_nvrtc() -> None:
    raise BuildError("no NVRTC")
