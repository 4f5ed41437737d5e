"""The GPU memory that an engine needs, as a table and a sentence: shared by `inspect`, `doctor` and the build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RealisIDError
from ..manifest import Build, Manifest
from ..memory import Needs, Size, gpu_builds, needs

GIB, MIB = 2**30, 2**20
CARDS_GIB = (8, 12, 16, 24)  # where there is no GPU to compare with
RESERVE_BYTES = GIB // 2  # assumed, not counted: CUDA's context and libraries, compiled kernels, a screen


@dataclass(frozen=True)
class Card:
    """A GPU: its name and its memory in bytes."""

    name: str
    nbytes: int


def present_card() -> Card | None:
    """The first GPU of this machine, or None."""
    from ..backends.gpu_facts import gpu_bytes, gpu_facts

    try:
        return Card(gpu_facts().name, gpu_bytes())
    except RealisIDError:
        return None


def sizes_of(
    manifest: Manifest, batch: int | None = None, persons: int | None = None, resolution: int | None = None
) -> list[Size]:
    """The size that is asked for; if none is, one picture of one person and the largest batch that was built for."""
    first = Size.asked(manifest, batch, persons, resolution)
    largest = Size.largest(manifest)
    asked = (batch, persons, resolution) != (None, None, None)
    return [first] if asked or largest in (None, first) else [first, largest]


def memory_lines(manifest: Manifest, sizes: Sequence[Size], card: Card | None) -> list[str]:
    """A table for each build that runs on a GPU, a column for each size; then which GPUs it fits."""
    lines: list[str] = []
    for build in gpu_builds(manifest):
        lines += ["", *_table(manifest, build, [needs(manifest, build, size) for size in sizes], card)]
    return lines


def _table(manifest: Manifest, build: Build, columns: Sequence[Needs], card: Card | None) -> list[str]:
    widths = [max(12, len(str(each.size)) + 2) for each in columns]

    def row(name: str, values: Sequence[str]) -> str:
        return f"{name:<38}" + "".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))

    def sizes(name: str) -> list[str]:
        return [amount(getattr(each, name)) for each in columns]

    scratch = [None if each.scratch is None else max(each.scratch.values()) for each in columns]
    return [
        row(f"GPU memory, {build.id}", [str(each.size) for each in columns]),
        row("  weights of the networks of every step", sizes("loop_weights")),
        row("  weights of the other networks", sizes("other_weights")),
        row("  arrays of the runtime", sizes("arena")),
        row("  scratch of the networks", [amount(each) for each in scratch]),
        row("  the VAE decoder at its peak", sizes("vae")),
        row("needed", [at_least(each, each.normal) for each in columns]),
        row('needed with memory="low"', [at_least(each, each.low) for each in columns]),
        *(f"{each.size}: {verdict(each, card)}" for each in columns),
        *_remarks(build, columns[0]),
    ]


def _remarks(build: Build, first: Needs) -> list[str]:
    lines = []
    if first.scratch is None:
        reason = "it does not say" if build.backend == "onnxruntime" else "no GPU has run these plans"
        lines.append(f"scratch is unknown and measured by nobody ({reason}): where it exceeds the VAE's peak, add it.")
    if first.vae is None:
        lines.append("the VAE's peak is unknown: an earlier version built this engine. Build it again to know it.")
    return lines


def verdict(found: Needs, card: Card | None) -> str:
    """Whether it fits, in a sentence: the GPU that is present, else the usual sizes."""
    counted = "without the unknown scratch it fits" if found.scratch is None else "fits"
    if card is not None:
        where = f"{card.name} with {amount(card.nbytes)}"
        if fits(found.normal, card.nbytes):
            return f"{counted} {where}."
        if fits(found.low, card.nbytes):
            return f'{counted} {where} only with memory="low".'
        return (
            f'does not fit {where}, with memory="low" neither: {amount(found.low + RESERVE_BYTES - card.nbytes)} are '
            "missing. Make fewer or smaller pictures at a time."
        )
    normal, low = ([size for size in CARDS_GIB if fits(nbytes, size * GIB)] for nbytes in (found.normal, found.low))
    if not low:
        return f'does not fit GPUs of {_listed(CARDS_GIB)} GB, with memory="low" neither.'
    parts = [f"{counted} GPUs of {_listed(normal)} GB" if normal else f'{counted} only with memory="low"']
    if low != normal:
        parts.append(f'with memory="low" of {_listed(low)} GB' if normal else f"GPUs of {_listed(low)} GB")
    if too_small := [size for size in CARDS_GIB if size not in low]:
        parts.append(f"not of {_listed(too_small)} GB")
    return ("; " if normal else ": ").join(parts[:2]) + "".join(f"; {part}" for part in parts[2:]) + "."


def fits(needed_bytes: int, card_bytes: int) -> bool:
    """Whether a GPU of this size has room beside what CUDA itself takes."""
    return needed_bytes + RESERVE_BYTES <= card_bytes


def at_least(found: Needs, nbytes: int) -> str:
    """The amount; marked where a part of it is unknown."""
    return f"{'≥ ' if found.scratch is None or found.vae is None else ''}{amount(nbytes)}"


def amount(nbytes: int | None) -> str:
    """ "7.61 GiB", "35.2 MiB", "unknown"."""
    if nbytes is None:
        return "unknown"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / MIB:.1f} MiB"


def _listed(sizes: Sequence[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last
